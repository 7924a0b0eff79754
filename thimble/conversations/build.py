"""``thimble conversations build``: read, lay out, tokenize, cut, split, check; once.

The records are read as a stream, encoded by several processes and written in their order, so the
result does not depend on the number of processes and memory does not grow with the text; each
example takes 51 bytes in the table. The split comes last: it is decided by a hash of the question
(or of the record's group), joined over all examples that share either, never by the place in the
file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thimble import artifacts
from thimble.config.schema import TOKENIZER_VARIABLE, DatasetConfig
from thimble.console import log, progress
from thimble.conversations import checks, sources
from thimble.conversations.dataset import EXAMPLE, KIND, SPLITS, Conversations, Unsealed
from thimble.conversations.records import Conversation, parse
from thimble.conversations.template import Template, encode, fit, special_id, template_of
from thimble.corpora.local import REFUSED_SHARE, Refusals, UserFile
from thimble.errors import ConfigError, DataError
from thimble.tokens import shards, splits
from thimble.tokens.loader import permute
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer
from thimble.workers import in_order, process_pool

COUNTED = (
    *("examples", "tokens", "labelled_tokens", "refused", "not_trained", "left_out"),
    *("prompt_cut", "answer_shortened", "answers_dropped", "unknown"),
    *("round_trips", "round_trips_changed"),
)
JUDGED_FROM = 100_000  # tokens after which a tokenizer that knows too little is refused at once


@dataclass(frozen=True)
class Built:
    """Where the tokenized conversations are, and what was found in them."""

    path: Path
    counts: dict[str, Any]
    checks: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "counts": self.counts,
            "checks": {key: value for key, value in self.checks.items() if key != "suspicious"},
            "warnings": self.checks["suspicious"],
        }


def build(
    config: DatasetConfig, *, output: str | Path | None = None, workers: int | None = None
) -> Built:
    """Tokenize the conversations that ``config`` names; ``output``: default ``data/conversations``.

    ``workers``: processes that tokenize, default ``dataset.dataloader_workers``. Does nothing when
    the directory already holds exactly this. Raises ConfigError (no tokenizer, no such template),
    DataError (the data do not fit) or EnvironmentProblem; whatever stood at ``output`` then still
    stands there.
    """
    path = config.tokenizer()
    if Path(path).suffix in (".json", ".model") and not Path(path).is_file():
        said = "dataset.tokenizer_path" if config.tokenizer_path else TOKENIZER_VARIABLE
        raise DataError(
            f"There is no tokenizer at {Path(path).absolute()}, where {said} says it is. Put it "
            "there, or name another path with --tokenizer (in a recipe dataset.tokenizer_path)."
        )
    tokenizer = load_tokenizer(path)
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise DataError(
            f"The tokenizer {config.tokenizer()} has {tokenizer.vocab_size:,} entries, and the one "
            f"wanted has {config.vocab_size:,} (dataset.vocab_size). Name that one, or make the "
            f"model for this one:\n  model.vocab_size={tokenizer.vocab_size}"
        )
    template = template_of(config.template, tokenizer, config.system_message)
    paths = sources.find(config.name or "slimorca", config.data_dir)
    inputs = {
        "files": [{"name": path.name, "sha256": artifacts.sha256_file(path)} for path in paths],
        "tokenizer": tokenizer.fingerprint,
    }
    options = {
        "template": config.template,
        "chat_template": getattr(template, "template", None),
        "system_message": config.system_message,
        "seq_len": config.seq_len,
        "subset_size": config.subset_size,
        "test_ratio": config.test_ratio,
        "val_ratio": config.val_ratio,
        "seed": config.seed,
    }
    name = f"{sources.stem(paths)}-{artifacts.fingerprint([inputs, options])[:8]}"
    target = Path(output) if output else Path("data/conversations") / name
    if artifacts.is_current(target, KIND, inputs, options):
        log.info("%s is already there and current", target)
        made = Conversations(target)
        return Built(target, made.counts, made.checks)
    if target.exists() and not (target / artifacts.MANIFEST).is_file():
        raise ConfigError(f"{target} exists and holds something else; choose another output.")

    with artifacts.atomic_directory(target) as out:
        tokenizer.save(out)
        counts = write(paths, config, tokenizer, template, out, workers)
        dtype = shards.dtype_for(tokenizer.vocab_size)
        pad_id = tokenizer.eot_id if tokenizer.pad_id is None else tokenizer.pad_id
        divide(out, config, counts)
        written = Unsealed(out, dtype, tokenizer.vocab_size, pad_id)
        found = checks.check(written, tokenizer, counts)
        artifacts.write_manifest(
            out,
            KIND,
            inputs=inputs,
            options=options,
            counts=counts,
            packages=("tokenizers", "sentencepiece", "transformers", "pyarrow", "numpy"),
            checks=found,
            dtype=dtype.str,
            vocab_size=tokenizer.vocab_size,
            end_id=template.end,
            pad_id=pad_id,
            examples_dtype=EXAMPLE.descr,
        )
    for line in (*truncation_notes(counts), *found["suspicious"]):
        log.warning("%s", line)
    return Built(target, counts, found)


def truncation_notes(counts: dict[str, Any]) -> list[str]:
    """What the length of the examples cost, one line each; empty when nothing was lost."""
    said = {
        "left_out": "{} of {} conversations are left out: no answer fits into seq_len",
        "prompt_cut": "{} of {} prompts lost their beginning to seq_len",
        "answer_shortened": "{} of {} conversations lost the end of an answer to seq_len",
        "answers_dropped": "{} later answers of {} conversations did not fit into seq_len",
    }
    of = f"{counts['examples'] + counts['left_out']:,}"
    return [text.format(f"{counts[k]:,}", of) for k, text in said.items() if counts[k]]


# ------------------------------------------------------------------------------------ tokens


class Encoded(NamedTuple):
    """What one chunk of records became; ``start`` in the table counts from the chunk's first."""

    ids: np.ndarray
    labels: np.ndarray
    examples: np.ndarray
    refused: list[tuple[int, str]]
    counts: Counter[str]


def write(
    paths: list[Path],
    config: DatasetConfig,
    tokenizer: Tokenizer,
    template: Template,
    out: Path,
    workers: int | None,
) -> dict[str, Any]:
    """Write ids, labels and the table into ``out``, where the tokenizer already is."""
    sizes = [sources.count(path) for path in paths]
    total = sum(sizes)
    if not total:
        raise DataError(f"{', '.join(map(str, paths))} holds no records.")
    wanted = min(config.subset_size or total, total)
    chosen = permute(np.arange(total), total, config.seed) < wanted
    limit = config.seq_len + 1  # the last token is only ever a label
    refusals = [Refusals(UserFile(str(path), path.name), Counter()) for path in paths]
    unknown = special_id(tokenizer, "unk")
    counts = Counter({**dict.fromkeys(COUNTED, 0), "records": wanted})

    def tasks() -> Iterator[tuple]:
        begin = 0
        for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
            for passed, records in sources.chunks(path, chosen[begin : begin + size]):
                yield out, tokenizer.fingerprint, config, limit, number, passed, records
            begin += size

    if workers is None:
        workers = os.cpu_count() if config.dataloader_workers is None else config.dataloader_workers
    count = min(max(workers or 1, 1), 1 + wanted // 1000)
    with ExitStack() as stack:
        files = [
            stack.enter_context(open(out / f"{name}.bin", "wb"))
            for name in ("ids", "labels", "examples")
        ]
        pool: Any = stack.enter_context(process_pool(count))
        _loaded[out, tokenizer.fingerprint] = tokenizer, template  # of this process
        stack.callback(_loaded.clear)
        advance = stack.enter_context(progress("tokenize", total, "records"))
        for number, passed, done in in_order(pool, _encode, tasks()):
            done.examples["start"] += counts["tokens"]
            for file, array in zip(files, done[:3], strict=True):
                file.write(array.tobytes())
            if unknown is not None:
                counts["unknown"] += int(np.sum(done.ids == unknown))
            counts.update(done.counts)
            refusals[number].records += done.counts["read"]
            for line, why in done.refused:
                refusals[number].refuse(f":{line}", why)
            if len(refusals[number].refused) > REFUSED_SHARE * wanted:
                refusals[number].judge()  # too many already, whatever is still to come
            if counts["tokens"] >= JUDGED_FROM:
                _judge_unknown(counts, config)
            advance(passed)
    for each in refusals:
        each.judge()
    if not counts["examples"]:
        raise DataError(_nothing(counts, config))
    _judge_unknown(counts, config)
    del counts["read"]
    return dict(counts)


def _judge_unknown(counts: Counter[str], config: DatasetConfig) -> None:
    share = counts["unknown"] / max(counts["tokens"], 1)
    if share > checks.MAX_UNKNOWN:
        raise DataError(
            f"{share:.2%} of the tokens are unknown to the tokenizer {config.tokenizer()} (at most "
            f"{checks.MAX_UNKNOWN:.1%} would be accepted): it was made for other text. Choose "
            "another one with --tokenizer (in a recipe dataset.tokenizer_path, or the variable "
            f"{TOKENIZER_VARIABLE})."
        )


def _nothing(counts: Counter[str], config: DatasetConfig) -> str:
    if counts["left_out"]:
        return (
            f"With seq_len={config.seq_len} no answer is left: half of it cannot hold the line "
            f"before an answer. Allow longer ones, such as --seq-len {4 * config.seq_len} (in a "
            f"recipe dataset.seq_len={4 * config.seq_len})."
        )
    return f"None of the {counts['records']:,} conversations is to be trained on: weights are 0."


_loaded: dict[tuple[Path, str], tuple[Tokenizer, Template]] = {}


def _encode(
    folder: Path,
    fingerprint: str,
    config: DatasetConfig,
    limit: int,
    file: int,
    passed: int,
    records: sources.Records,
) -> tuple[int, int, Encoded]:
    """The examples of a chunk; ``passed`` records of the file were looked at for it."""
    if (folder, fingerprint) not in _loaded:
        _loaded.clear()
        tokenizer = load_tokenizer(folder)
        template = template_of(config.template, tokenizer, config.system_message)
        _loaded[folder, fingerprint] = tokenizer, template
    tokenizer, template = _loaded[folder, fingerprint]
    counts = Counter(read=len(records))
    kept: list[tuple[int, Conversation]] = []
    laid_out, refused = [], []
    for line, record in records:
        try:
            conversation = parse(record)
            if not conversation.loss_weight:
                counts["not_trained"] += 1
                continue
            laid_out.append(template.parts(conversation))
        except ValueError as error:
            refused.append((line, str(error)))
            continue
        kept.append((line, conversation))
        if len(kept) % 10 == 1:
            answer = conversation.turns[-1].answer
            counts["round_trips"] += 1
            counts["round_trips_changed"] += tokenizer.decode(tokenizer.encode(answer)) != answer
    counts["refused"] = len(refused)
    first = int(bool(laid_out) and laid_out[0][0].id is not None)  # such as <s>
    ids, labels, rows = [], [], []
    for (line, conversation), example in zip(kept, encode(laid_out, tokenizer), strict=True):
        fitted = fit(*example, limit, template.header, first)
        if fitted is None:
            counts["left_out"] += 1
            continue
        counts["prompt_cut"] += fitted.prompt_cut
        counts["answer_shortened"] += fitted.answer_shortened
        counts["answers_dropped"] += fitted.answers_dropped
        ids.append(fitted.ids)
        labels.append(fitted.labels)
        text = splits.text_hash(conversation.turns[0].question)
        group = splits.hash64(conversation.group) if conversation.group else text
        rows.append(
            (
                counts["tokens"],
                len(fitted.ids),
                int(np.argmax(fitted.labels)),
                int(fitted.labels.sum()),
                conversation.loss_weight,
                0,
                file,
                line,
                group,
                text,
            )
        )
        counts["examples"] += 1
        counts["tokens"] += len(fitted.ids)
        counts["labelled_tokens"] += rows[-1][3]
    dtype = shards.dtype_for(tokenizer.vocab_size)
    return (
        file,
        passed,
        Encoded(
            np.concatenate(ids).astype(dtype, copy=False) if ids else np.empty(0, dtype),
            np.concatenate(labels).astype(np.uint8) if labels else np.empty(0, np.uint8),
            np.array(rows, dtype=EXAMPLE),
            refused,
            counts,
        ),
    )


# ------------------------------------------------------------------------------------ splits


def divide(out: Path, config: DatasetConfig, counts: dict[str, Any]) -> None:
    """Assign every example of the table to train, test or val, and count them."""
    table = np.memmap(out / "examples.bin", EXAMPLE, mode="r+")
    nothing = np.zeros(0)
    group, joined = splits.merge_equal_texts(
        splits.Documents(np.array(table["group"]), np.array(table["text"]), nothing, nothing)
    )
    names, member = np.unique(group, return_inverse=True)
    drawn = np.array([splits.hash64(f"{config.seed}:{name}") / 2**64 for name in names])
    # Test comes first, so that it is the same prompts whatever is held out for val.
    bounds = np.cumsum([config.test_ratio, config.val_ratio])
    places = np.array([SPLITS.index(name) for name in ("test", "val", "train")], dtype=np.uint8)
    table["split"] = places[np.searchsorted(bounds, drawn, side="right")][member]
    table.flush()
    counts["groups"], counts["joined_groups"] = len(names), joined
    for place, name in enumerate(SPLITS):
        counts[name] = int(np.sum(table["split"] == place))
    if not counts["train"]:
        raise DataError(
            f"All {counts['examples']:,} examples fell into the test and val splits, none is left "
            "to train on. Use more data, or a lower dataset.test_ratio."
        )
    for name, share in (("test", config.test_ratio), ("val", config.val_ratio)):
        if share and not counts[name]:
            log.warning(
                "the %s split is empty: %s questions are too few for a share of %g",
                name,
                f"{len(names):,}",
                share,
            )
