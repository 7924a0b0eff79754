"""``thimble tokens build``: scan, split, train the tokenizer, encode, count.

The corpus is read three times, a row group at a time (hashes for the split; a sample for the
tokenizer; everything for the shards), by several processes, and written in corpus order. So the
result does not depend on the number of workers, and memory does not grow with the corpus, except
for 28 bytes a document that decide its split.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from thimble import artifacts
from thimble.console import log, progress
from thimble.errors import ConfigError, DataError
from thimble.tokens import shards, splits, statistics
from thimble.tokens.tokenizer import MIN_VOCAB_SIZE, Tokenizer, load_tokenizer, train
from thimble.workers import in_order, process_pool

COLUMNS = ("id", "text", "source", "category", "group")
SEED = 1
SAMPLE_BYTES_PER_ENTRY = 4096  # of text to train a tokenizer on, for each entry of its vocabulary


@dataclass(frozen=True)
class RowGroup:
    file: Path
    index: int
    first: int  # place of its first document in the corpus
    rows: int

    def read(self, *columns: str) -> list[list[str]]:
        """The named columns as lists; a null is a DataError."""
        try:
            table = pyarrow.parquet.ParquetFile(self.file).read_row_group(self.index, columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{self.file} cannot be read: {error}. Build the corpus again."
            ) from None
        for name in columns:
            if table[name].null_count:
                raise DataError(f"{self.file} has an empty {name}; build the corpus again.")
        return [table[name].to_pylist() for name in columns]


def build(
    corpus: str | Path,
    *,
    output: str | Path | None = None,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    workers: int | None = None,
) -> Path:
    """Turn a corpus into a tokens directory and return its path.

    ``corpus``: a corpus directory, or the name of one under ``data/corpus``. ``output``: default
    ``data/tokens/<corpus>-<vocab size>``. ``tokenizer``: an existing one (folder, tokenizer.json,
    SentencePiece .model, hub id) in place of training one of ``vocab_size`` entries on the train
    split. ``workers``: processes, default one a core.

    Does nothing when the directory already holds exactly this. Raises ConfigError, DataError or
    EnvironmentProblem; whatever stood at ``output`` before then still stands there.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}.")
    if tokenizer is None and not MIN_VOCAB_SIZE <= vocab_size <= 2**20:
        raise ConfigError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (all bytes and three special tokens) "
            f"and at most {2**20:,}, not {vocab_size}."
        )
    directory = find_corpus(corpus)
    manifest = artifacts.read_manifest(directory, "corpus", make="thimble corpus build NAME")
    existing = None if tokenizer is None else load_tokenizer(tokenizer)
    vocab_size = existing.vocab_size if existing else vocab_size
    target = Path(output) if output else Path("data/tokens") / f"{directory.name}-{vocab_size}"
    inputs = {
        "corpus": {
            "name": directory.name,
            "fingerprint": manifest["fingerprint"],
            "files": {
                name: facts["sha256"]
                for name, facts in manifest["files"].items()
                if name.startswith("documents-")
            },
        },
        "tokenizer": existing.fingerprint if existing else None,
    }
    options = {"vocab_size": vocab_size, "tokenizer": str(tokenizer) if tokenizer else None}
    if artifacts.is_current(target, "tokens", inputs, options):
        log.info("%s is already there and current", target)
        return target
    if target.exists() and not (target / artifacts.MANIFEST).is_file():
        raise ConfigError(f"{target} exists and holds something else; choose another output.")

    groups = row_groups(directory, manifest)
    count = min(workers or os.cpu_count() or 1, max(1, len(groups) // 2))
    with ExitStack() as stack:
        out = stack.enter_context(artifacts.atomic_directory(target))
        pool = stack.enter_context(process_pool(count))
        documents = scan(groups, pool)
        plan = splits.plan(documents)
        used = existing or train_tokenizer(groups, documents, plan, vocab_size)
        used.save(out)
        counts, frequency, changed = encode(groups, plan, used, out, pool)
        statistics.write(out, used, counts, frequency, len(groups), changed)
        artifacts.write_json(out / "vocab.json", used.vocabulary())
        artifacts.write_manifest(
            out,
            "tokens",
            inputs=inputs,
            options=options,
            counts=counts,
            packages=("tokenizers", "sentencepiece", "pyarrow", "numpy"),
            dtype=shards.dtype_for(used.vocab_size).str,
            vocab_size=used.vocab_size,
            eot_id=used.eot_id,
            pad_id=used.pad_id,
            tokenizer={"fingerprint": used.fingerprint, "trained": existing is None},
        )
    return target


def find_corpus(corpus: str | Path) -> Path:
    """The directory of a corpus given by path or by name under ``data/corpus``."""
    if Path(corpus).is_dir():
        return Path(corpus)
    home = Path("data/corpus")
    named = [home / str(corpus)] if (home / str(corpus)).is_dir() else []
    named = named or sorted(path for path in home.glob(f"{corpus}-*") if path.is_dir())
    if len(named) == 1:
        return named[0]
    if named:
        raise ConfigError(
            f"{corpus} may be any of {', '.join(path.name for path in named)}; name one of them."
        )
    raise DataError(
        f"There is no corpus {corpus}, neither as a folder nor under {home}. Make it with:\n"
        f"  thimble corpus build {corpus}"
    )


def row_groups(directory: Path, manifest: dict[str, Any]) -> list[RowGroup]:
    """The row groups of a corpus in order; damaged files and missing columns are a DataError."""
    problems = artifacts.damaged_files(directory, manifest, hashes=False)
    if problems:
        raise DataError(f"The corpus {directory} is damaged: {problems[0]}. Build it again.")
    groups: list[RowGroup] = []
    first = 0
    for file in sorted(directory.glob("documents-*.parquet")):
        try:
            opened = pyarrow.parquet.ParquetFile(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{file} cannot be read: {error}. Build the corpus again.") from None
        missing = [name for name in COLUMNS if name not in opened.schema_arrow.names]
        if missing:
            raise DataError(
                f"{file} has no column {', '.join(missing)}; it has "
                f"{', '.join(opened.schema_arrow.names)}. Build the corpus again."
            )
        for name in COLUMNS:
            kind = opened.schema_arrow.field(name).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(
                    f"{file}: column {name} is of type {kind}, not string. Build the corpus again."
                )
        for index in range(opened.num_row_groups):
            rows = opened.metadata.row_group(index).num_rows
            groups.append(RowGroup(file, index, first, rows))
            first += rows
    if not first:
        raise DataError(f"The corpus {directory} holds no documents. Give it some text.")
    return groups


def scan(groups: list[RowGroup], pool: Any) -> splits.Documents:
    """Hashes, source and size of every document, in order."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    sources: dict[str, int] = {}
    with progress("scan", sum(group.rows for group in groups), "documents") as advance:
        for group, text, source, size in in_order(pool, _scan, ((group,) for group in groups)):
            codes = [sources.setdefault(name, len(sources)) for name in source]
            found.append((group, text, np.array(codes, dtype=np.int32), size))
            advance(len(size))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    return splits.Documents(*columns)


def _scan(group: RowGroup) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    ids, texts, source, names = group.read("id", "text", "source", "group")
    return (
        np.array([splits.hash64(n or i) for n, i in zip(names, ids, strict=True)], dtype=np.uint64),
        np.array([splits.text_hash(text) for text in texts], dtype=np.uint64),
        source,
        np.array([len(text.encode()) for text in texts], dtype=np.int64),
    )


def train_tokenizer(
    groups: list[RowGroup], documents: splits.Documents, plan: splits.Plan, vocab_size: int
) -> Tokenizer:
    """A byte-level BPE of the train split, from a sample whose size the vocabulary decides."""
    in_train = np.isin(plan.split, splits.TRAIN)
    size = int(documents.bytes[in_train].sum())
    share = min(1.0, vocab_size * SAMPLE_BYTES_PER_ENTRY / max(size, 1))
    chosen = in_train & (np.random.default_rng(SEED).random(len(documents)) < share)
    if not chosen.any():
        chosen = in_train
    total = int(documents.bytes[chosen].sum())

    def texts() -> Iterator[str]:
        for group in groups:
            mask = chosen[group.first : group.first + group.rows]
            if not mask.any():
                continue
            for offset, text in enumerate(group.read("text")[0]):
                if mask[offset]:
                    index = group.first + offset
                    for split, piece in splits.pieces(text, 0, plan.cuts.get(index, [])):
                        if split == splits.TRAIN:
                            yield piece
                    advance(documents.bytes[index])

    with progress("train the tokenizer", total, "bytes") as advance:
        trained = train(texts(), vocab_size)
    if trained.vocab_size < vocab_size:
        log.warning(
            "the text has only enough repeated pairs for a vocabulary of %d, not %d",
            trained.vocab_size,
            vocab_size,
        )
    return trained


def encode(
    groups: list[RowGroup], plan: splits.Plan, tokenizer: Tokenizer, out: Path, pool: Any
) -> tuple[dict[str, dict[str, int]], np.ndarray, list[str]]:
    """Write the shards.

    Returns the counts of each split, how often train has each id (int64 [vocab_size]), and the
    names of documents that decoding changed; one of each row group is tried.
    """
    dtype = shards.dtype_for(tokenizer.vocab_size)
    frequency = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    changed: list[str] = []

    def tasks() -> Iterator[tuple]:
        cut = sorted(plan.cuts)
        for group in groups:
            last = group.first + group.rows
            cuts = {
                index - group.first: plan.cuts[index]
                for index in cut
                if group.first <= index < last
            }
            yield out, tokenizer.fingerprint, group, plan.split[group.first : last], cuts

    with ExitStack() as stack:
        writers = [
            stack.enter_context(shards.SplitWriter(out, split, dtype)) for split in shards.SPLITS
        ]
        advance = stack.enter_context(
            progress("tokenize", sum(group.rows for group in groups), "documents")
        )
        for rows, parts, lost in in_order(pool, _encode, tasks()):
            for split, ids, documents in parts:
                writers[split].append(ids, documents)
                if split == splits.TRAIN:
                    frequency += np.bincount(ids, minlength=len(frequency))
            changed += lost
            advance(rows)
    counts = {split: writer.counts for split, writer in zip(shards.SPLITS, writers, strict=True)}
    return counts, frequency, changed


_loaded: dict[str, Tokenizer] = {}  # of this process, by fingerprint


def _encode(
    out: Path,
    fingerprint: str,
    group: RowGroup,
    split: np.ndarray,
    cuts: dict[int, list[tuple[int, int]]],
) -> tuple[int, list[tuple[int, np.ndarray, dict[str, Any]]], list[str]]:
    """One row group: rows, (split, ids, columns) of each split, and what did not come back."""
    if fingerprint not in _loaded:
        _loaded.clear()
        _loaded[fingerprint] = load_tokenizer(out)
    tokenizer = _loaded[fingerprint]
    names, texts, sources, categories = group.read("id", "text", "source", "category")
    rows: dict[int, list[tuple[str, int]]] = {}
    for row, text in enumerate(texts):
        for which, piece in splits.pieces(text, int(split[row]), cuts.get(row, [])):
            rows.setdefault(which, []).append((piece, row))
    parts = []
    for which, members in rows.items():
        ids, lengths = tokenizer.pack([piece for piece, _ in members])
        parts.append(
            (
                which,
                ids,
                {
                    "id": [names[row] for _, row in members],
                    "source": [sources[row] for _, row in members],
                    "category": [categories[row] for _, row in members],
                    "tokens": lengths,
                    "bytes": np.array([len(piece.encode()) for piece, _ in members]),
                },
            )
        )
    same = tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    return group.rows, parts, [] if same else [names[0]]
