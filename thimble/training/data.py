"""What a run is trained on: tokens, conversations or puzzles, opened and held against the model."""

from __future__ import annotations

import fcntl
import functools
import multiprocessing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble import artifacts
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import ConfigError, DataError

if TYPE_CHECKING:
    from thimble.conversations.dataset import Conversations
    from thimble.puzzles.loader import Split
    from thimble.tokens.packed import PackedChunks
    from thimble.tokens.shards import TokenSplit

PUZZLE_KEYS = ("vocab_size", "max_position_embeddings", "puzzle_identifiers")


def ready(config: Config) -> Config:
    """The configuration of a run whose data are there: conversations are tokenized, if they are
    not yet, of puzzles the model takes alphabet, length and identifiers, and a teacher that is a
    run, or the newest one of a recipe, is the checkpoint it is now: resumed, the run keeps it.

    Raises DataError or ConfigError when something is missing or does not fit.
    """
    if config.dataset.name is not None and config.data.path is None:
        config = _tokenized(config)
    elif config.objective.name == "act" and artifacts.kind(config.data.folder) != "conversations":
        config = _of_puzzles(config)
    config = with_teacher(config, teachers_now([config]))
    if config.objective.name != "act" and config.training.eval_every:
        open_data(config, "val")  # a run that cannot be judged says so now, not after hours
    return config


def teachers_now(configs: Iterable[Config]) -> dict[str, str]:
    """Each ``teacher.path`` to learn from that is on this machine, and the folder it means now."""
    from thimble.teachers.models import find

    names = {c.teacher.path for c in configs if _has_teacher(c) and c.teacher.path is not None}
    return {name: str(find(name)) for name in sorted(names) if Path(name).exists()}


def with_teacher(config: Config, known: Mapping[str, str]) -> Config:
    """The run with the teacher that its ``teacher.path`` meant when ``teachers_now`` looked."""
    path = config.teacher.path
    if not _has_teacher(config) or path is None or known.get(path, path) == path:
        return config
    teacher = config.teacher.model_copy(update={"path": known[path]})
    return config.model_copy(update={"teacher": teacher})


def _has_teacher(config: Config) -> bool:
    if config.teacher.mode == "served":  # by a name that is the server's
        return False
    return config.objective.name == "distill" or config.training.init_from_teacher


def _tokenized(config: Config) -> Config:
    from thimble.conversations.build import build

    home = Path("data/conversations")
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".lock", "a") as file:
        # Of several processes the first tokenizes; the others wait for it and find it done. A child
        # of that one's pool must not: it is here because a script has no main guard, and fails.
        if multiprocessing.parent_process() is None:
            fcntl.flock(file, fcntl.LOCK_EX)
        built = build(config.dataset)
    for line in built.checks["suspicious"]:
        log.warning("suspicious data: %s", line)
    data = config.data.model_copy(update={"path": str(built.path)})
    return config.model_copy(update={"data": data})


def _of_puzzles(config: Config) -> Config:
    found = open_data(config).metadata
    wanted = {
        "vocab_size": found.vocab_size,
        "max_position_embeddings": found.seq_len,
        # A model without embeddings of puzzles stays without.
        "puzzle_identifiers": found.num_puzzle_identifiers
        if config.model.puzzle_identifiers
        else 0,
    }
    changed = {k: v for k, v in wanted.items() if getattr(config.model, k) != v}
    length = config.training.sequence_length
    if not changed and length == found.seq_len:
        return config
    words = [f"model.{key}={value}" for key, value in changed.items()]
    log.info("as the puzzles of %s have it: %s", config.data.path, " ".join(words) or "length")
    tree = config.model_dump(mode="python")
    tree["model"] |= changed
    tree["training"]["sequence_length"] = found.seq_len
    return Config.model_validate(tree)


def open_data(config: Config, split: str = "train") -> Any:
    """A split of ``data.path``: ``TokenSplit``, ``PackedChunks``, puzzles' ``Split``, or
    ``Conversations`` whole.

    Raises DataError when it is not there, not whole, or of a kind the objective cannot have, and
    ConfigError when the model's vocabulary or length does not fit.
    """
    if config.objective.name != "act":
        return _tokens(config, split)
    if artifacts.kind(config.data.folder) == "conversations":
        return _conversations(config)
    return _puzzles(config, split)


def separated(config: Config) -> bool:
    """Whether a model is told where documents begin: retention always, attention of packed chunks.
    ``language.NextTokenTask.seen`` does so."""
    from thimble.tokens.packing import KIND

    if config.objective.name == "act" or config.data.path is None:
        return False
    return config.model.mixer == "retention" or artifacts.kind(config.data.folder) == KIND


def held_out_unit(config: Config) -> str:
    """What the held-out text of a run is measured in: bits per byte, or where nobody knows the
    bytes, nats per token, which are those of one tokenizer alone."""
    from thimble.tokens.packing import KIND

    if config.data.path is not None:
        kind = artifacts.kind(config.data.folder)
        if kind == KIND:
            manifest = artifacts.read_json(Path(config.data.folder) / artifacts.MANIFEST)
            return f"nats per token of tokenizer {manifest['tokenizer']['fingerprint'][:8]}"
        if kind == "puzzles":
            return "nats per cell"
    return "bits per byte"


def _tokens(config: Config, split: str) -> TokenSplit | PackedChunks:
    from thimble.tokens import packed, shards
    from thimble.tokens.packed import PackedChunks
    from thimble.tokens.packing import KIND
    from thimble.tokens.shards import TokenSplit

    folder, other = config.data.folder, config.data.val_path
    data: TokenSplit | PackedChunks
    if not Path(folder).exists():
        raise DataError(
            f"There are no tokens at {folder}. Make them of a corpus, or of JSONL files:\n"
            f"  {shards.MAKE}\n  {packed.MAKE}"
        )
    if artifacts.kind(folder) == KIND:
        length = config.training.sequence_length
        if split == "val" and other is not None:
            paths = [str(Path(path).resolve()) for path in (folder, other)]
            found = [artifacts.read_manifest(path, KIND, make=packed.MAKE) for path in paths]
            marks = tuple(manifest["fingerprint"] for manifest in found)
            data = _held_out(paths[0], paths[1], config.seed, length, marks)
        else:
            data = PackedChunks(folder, split, seed=config.seed, length=length)
    else:
        if other not in (None, folder):
            raise ConfigError(
                f"data.val_path is for packed chunks (thimble tokens pack); {folder} holds its own "
                "validation split. Leave it out:\n  data.val_path=null"
            )
        data = TokenSplit(folder, split)
    _fits(config, data.vocab_size)
    return data


@functools.lru_cache(maxsize=1)
def _held_out(folder: str, other: str, seed: int, length: int, marks: tuple) -> PackedChunks:
    """Read once for all evaluations of a run, since the hashes of all documents are compared;
    again where the folders have changed (``marks``)."""
    from thimble.tokens.packed import train_and_validation

    return train_and_validation(folder, other, seed=seed, length=length)[1]


def _fits(config: Config, vocabulary: int) -> None:
    if vocabulary > config.model.vocab_size:
        raise ConfigError(
            f"{config.data.path} has {vocabulary:,} token ids, the model has "
            f"{config.model.vocab_size:,}. Use:\n  model.vocab_size={vocabulary}"
        )


def _conversations(config: Config) -> Conversations:
    from thimble.conversations.dataset import Conversations

    if not config.model.causal:
        raise ConfigError(
            f"{config.data.path} holds conversations, and model.causal=false has no place in a "
            "language model: it would be given the words it is asked for. Use:\n  model.causal=true"
        )
    data = Conversations(config.data.folder)
    _fits(config, data.vocab_size)
    if data.seq_len > config.training.sequence_length:
        raise ConfigError(
            f"{config.data.path} has examples of up to {data.seq_len} tokens, and the run has "
            f"training.sequence_length={config.training.sequence_length}. Use:\n"
            f"  training.sequence_length={data.seq_len} "
            f"model.max_position_embeddings={data.seq_len}"
        )
    return data


def _puzzles(config: Config, split: str) -> Split:
    from thimble.puzzles.loader import Split

    kind = artifacts.kind(config.data.folder)
    if kind not in (None, "puzzles"):
        raise DataError(
            f"{config.data.path} holds {kind}, and objective.name=act learns from conversations or "
            "puzzles. For these data:\n  objective.name=next_token model.schedule=once"
        )
    if config.model.causal:
        raise ConfigError(
            f"{config.data.path} holds puzzles, whose answer stands in the places of the question: "
            "a model with model.causal=true fills each in before it has seen the rest. Use:\n"
            "  model.causal=false"
        )
    return Split(config.data.folder, split)
