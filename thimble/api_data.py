"""The part of ``thimble.api`` that makes data: corpora, tokens, conversations, teachers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble.errors import ConfigError, DataError

if TYPE_CHECKING:
    from thimble.conversations.build import Built
    from thimble.corpora.download import Downloads
    from thimble.teachers.fill import Filled
    from thimble.teachers.finetune import Finetuned
    from thimble.tokens.packing import Packed

PathLike = str | Path


def build_corpus(
    name: str | None = None,
    *,
    sources: Sequence[PathLike] = (),
    scale: str = "quick",
    output: PathLike | None = None,
    workers: int | None = None,
    seed: int = 1,
) -> Path:
    """Make clean, deduplicated documents; returns the corpus folder.

    ``name`` is a corpus we know (``os_kernel``), ``sources`` are files and folders of your own.
    """
    from thimble import corpora

    if not name and not sources:
        raise ConfigError(
            "What should the corpus be made of? A corpus we know, or files of your own:\n"
            "  thimble corpus build os_kernel\n  thimble corpus build --from PATH"
        )
    return corpora.build(
        name,
        sources=tuple(Path(source) for source in sources),
        scale=scale,
        output=Path(output) if output else None,
        workers=workers,
        seed=seed,
    )


def download_data(
    plan: str = "poc",
    categories: Sequence[str] = (),
    *,
    output: PathLike = "data/distillation",
    dry_run: bool = False,
    status: bool = False,
) -> Downloads:
    """Fetch the data sets of a plan (``poc`` or ``curriculum``) from the hub as JSONL files.

    What is there already is kept, what was begun goes on. ``status`` only says what is there,
    ``dry_run`` asks the hub for sizes and licences, too.
    """
    from thimble.corpora.download import download

    return download(plan, categories, output, dry_run=dry_run, status=status)


def build_tokens(
    corpus: PathLike,
    *,
    output: PathLike | None = None,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    workers: int | None = None,
) -> Path:
    """Train or load a tokenizer and write the shards of a corpus; returns the tokens folder.

    ``corpus`` is a corpus folder or the name of one in ``data/corpus``. Without ``tokenizer`` a
    byte-level BPE of ``vocab_size`` entries (4096 unless given) is trained on the training split.
    """
    from thimble import tokens

    if tokenizer is not None and vocab_size is not None:
        raise ConfigError(
            f"The tokenizer {tokenizer} has its own vocabulary, so vocab_size={vocab_size} cannot "
            "hold as well. Leave one of them out."
        )
    return tokens.build(
        find_corpus(corpus),
        output=Path(output) if output else None,
        vocab_size=vocab_size or 4096,
        tokenizer=_of_run(tokenizer),
        workers=workers,
    )


def pack_tokens(
    source: PathLike,
    output: PathLike,
    *,
    max_seq_length: int = 8192,
    tokenizer: str | None = None,
    **options: Any,
) -> Packed:
    """Pack text files, JSONL and parquet into chunks of one length, as parquet; returns the counts.

    ``tokenizer``: folder, file, run or name on the hub; default $LLAMA_TOKENIZER, or Llama 3.2.
    ``options``: ``recursive``, ``val_ratio``, ``skip_existing``, ``force``, ``workers``, as in
    ``thimble.tokens.packing.pack``.
    """
    from thimble.tokens.packing import pack

    tokenizer = _of_run(tokenizer)
    return pack(source, output, max_seq_length=max_seq_length, tokenizer=tokenizer, **options)


def _of_run(tokenizer: str | None) -> str | None:
    """A run of ours has its tokenizer in its checkpoints."""
    if tokenizer is None or not (Path(tokenizer) / "checkpoints").is_dir():
        return tokenizer
    from thimble.training.checkpoint import resolve

    return str(resolve(tokenizer))


def build_conversations(
    name: PathLike = "slimorca",
    *,
    tokenizer: PathLike | None = None,
    output: PathLike | None = None,
    workers: int | None = None,
    **options: Any,
) -> Built:
    """Tokenize instruction data, with labels on the answers; returns where, counts and checks.

    ``name``: ``slimorca`` or ``openorca`` (fetched), a corpus with conversations, or a file or
    folder. ``tokenizer``: a path, or the variable LLAMA_TOKENIZER. ``options``: ``seq_len``,
    ``subset_size``, ``test_ratio``, ``template``, ``system_message``, ``vocab_size``, ``data_dir``,
    ``seed``, as in ``thimble.config.schema``.
    """
    from pydantic import ValidationError

    from thimble.config.schema import DatasetConfig

    path = None if tokenizer is None else str(tokenizer)
    try:
        config = DatasetConfig(name=str(name), tokenizer_path=path, **options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{key}={first['input']!r}: {first['msg']}.") from error
    config.tokenizer()  # what is missing is said before anything is imported or read
    from thimble.conversations.build import build

    return build(config, output=output, workers=workers)


def build_sudoku(output: PathLike | None = None, **options: Any) -> Path:
    """Make a Sudoku data set, of files or generated; returns its folder (data/puzzles/sudoku).

    ``options``: ``source``, ``generate``, ``generate_test``, ``size``, ``subsample_size``,
    ``min_difficulty``, ``num_aug``, ``seed``, ``workers``, as in ``thimble.puzzles.sudoku.build``.
    """
    from thimble.puzzles import sudoku

    return sudoku.build(output or "data/puzzles/sudoku", **options)


def build_maze(output: PathLike | None = None, **options: Any) -> Path:
    """Make a data set of mazes, of files or generated; returns its folder (data/puzzles/maze).

    ``options``: ``source``, ``generate``, ``generate_test``, ``size``, ``subsample_size``, ``aug``,
    ``seed``, ``workers``, as in ``thimble.puzzles.maze.build``.
    """
    from thimble.puzzles import maze

    return maze.build(output or "data/puzzles/maze", **options)


def build_arc(output: PathLike | None = None, *, input_file_prefix: str, **options: Any) -> Path:
    """Make an ARC data set from the combined files; returns its folder (data/puzzles/arc).

    ``options``: ``subsets``, ``test_set_name``, ``num_aug``, ``max_side``, ``seed``, ``workers``,
    as in ``thimble.puzzles.arc.build``.
    """
    from thimble.puzzles import arc

    return arc.build(output or "data/puzzles/arc", input_file_prefix=input_file_prefix, **options)


def find_corpus(corpus: PathLike) -> Path:
    """The folder of a corpus given as a path, or by the name it has in ``data/corpus``."""
    path, home = Path(corpus), Path("data/corpus")
    if path.exists() or path.is_absolute() or len(path.parts) > 1:
        return path
    found = [folder for folder in sorted(home.glob("*")) if folder.name == str(path)] or [
        folder for folder in sorted(home.glob("*")) if folder.name.startswith(f"{path}-")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        lines = "".join(f"\n  thimble tokens build {folder}" for folder in found)
        raise ConfigError(f"There are {len(found)} corpora named {corpus}. Choose one:{lines}")
    raise DataError(
        f"There is no corpus {corpus} in {home}. Make it with:\n  thimble corpus build {corpus}"
    )


def cache_teacher(
    teacher: PathLike,
    tokens: PathLike,
    *,
    split: str = "train",
    sequence_length: int | None = None,
    topk: int = 64,
    samples: int | None = None,
    temperatures: Sequence[float] = (1.0,),
    seed: int = 1,
    **options: Any,
) -> Filled:
    """Ask a teacher about every row of a data set and keep what it says; goes on where it was.

    ``teacher``: a folder, a run of ours, a model on the hub, or a server's address. Kept are the
    ``topk`` likeliest tokens and the tail's mass at each temperature, or, with ``samples``, so many
    draws. ``options``: ``output``, ``adapter``, ``served_model``, ``device``, ``precision``,
    ``ram_disk``, ``batch_positions``, as in ``thimble.teachers.fill.cache``.
    """
    from thimble.teachers.asked import Asked
    from thimble.teachers.fill import cache

    asked = Asked(samples or topk, tuple(temperatures), samples is not None, seed)
    return cache(teacher, tokens, asked, split=split, length=sequence_length, **options)


def finetune_teacher(
    teacher: PathLike,
    tokens: PathLike,
    *,
    output: PathLike | None = None,
    sequence_length: int | None = None,
    resume: PathLike | None = None,
    ram_disk: bool = False,
    device: str = "auto",
    precision: str = "auto",
    **options: Any,
) -> Finetuned:
    """Make a teacher used to the data by LoRA; writes an adapter and a merged checkpoint.

    ``resume``: ``auto``, or a checkpoint. ``options`` as in ``thimble.teachers.finetune.Options``:
    ``rank``, ``learning_rate``, ``max_steps``, ``batch_rows`` and others.
    """
    from thimble.teachers import finetune
    from thimble.teachers.examples import open_examples
    from thimble.training.devices import resolve_device

    chosen = finetune.Options(**options)
    rows, held_out = (open_examples(tokens, split, sequence_length) for split in ("train", "val"))
    folder = Path("runs/teachers") / f"{Path(teacher).name}-{Path(tokens).name}"
    return finetune.finetune(
        teacher,
        rows,
        held_out,
        output or folder,
        chosen,
        device=resolve_device(device),
        precision=precision,
        ram_disk=ram_disk,
        resume=resume,
    )
