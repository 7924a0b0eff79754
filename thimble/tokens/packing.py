"""``thimble tokens pack``: documents end to end, cut into chunks of one length, as parquet.

    input files -> documents -> ids, each document with its end -> chunks -> row groups of shards

Every JSONL or parquet file becomes a folder of its own, and so do the text files of one folder
together. A folder whose input has the same content as before stays; the others are made anew. A
chunk is full: a document that does not fit goes on in the next one. Only the last chunk of a split
is padded, in a shard of its own with an ``attention_mask``. Which split a document belongs to is
decided by the hash of its text alone, so one text is on the same side in every file and folder.

Columns: ``input_ids`` [L]; ``document_starts``: positions in the chunk at which a document begins,
with 0 for the one that goes on from the chunk before; ``documents``: the hash of each of these.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from thimble import artifacts
from thimble.console import log, progress
from thimble.corpora import local
from thimble.corpora.local import UserFile
from thimble.errors import ConfigError, DataError
from thimble.tokens import splits
from thimble.tokens.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from thimble.workers import in_order, process_pool

KIND, PART = "packed", "packed part"
SPLITS = ("train", "val")
TOKENIZER = "meta-llama/Llama-3.2-1B"  # where neither an option nor $LLAMA_TOKENIZER names one
GROUP_TOKENS = 1 << 17  # of a row group: what has to be decoded at once
SHARD_TOKENS = 1 << 28  # of a file
TASK_CHARACTERS = 1 << 20
TASK_DOCUMENTS = 500
MIN_LENGTH = 2  # one token and what follows it


@dataclass(frozen=True)
class Packed:
    """Where the chunks are, and what was done for them."""

    path: Path
    counts: dict[str, Any]
    made: int
    kept: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            **self.counts,
            "inputs made": self.made,
            "inputs unchanged": self.kept,
        }


@dataclass(frozen=True)
class Unit:
    """Input that becomes one folder: a file of records, or the text files of one folder."""

    name: str
    files: tuple[UserFile, ...]

    @property
    def folder(self) -> str:
        """One name for each unit, whatever folders or endings tell them apart."""
        plain = re.sub(r"[^\w.]+", "-", self.name).strip("-.")[-80:]
        return f"{plain or 'texts'}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    def inputs(self) -> list[dict[str, str]]:
        return [{"name": f.name, "sha256": artifacts.sha256_file(f.path)} for f in self.files]


def pack(
    source: str | Path,
    output: str | Path,
    *,
    recursive: bool = False,
    max_seq_length: int = 8192,
    tokenizer: str | None = None,
    val_ratio: float = 0.01,
    skip_existing: bool = False,
    force: bool = False,
    workers: int | None = None,
) -> Packed:
    """Pack the files of ``source`` (a folder, or one file) into ``output``.

    ``recursive``: those of folders in it, too. ``tokenizer``: as in ``load_tokenizer``, default
    $LLAMA_TOKENIZER or Llama 3.2. ``val_ratio``: share of the documents held out. What is unchanged
    is always kept, which ``skip_existing`` says in so many words; ``force`` makes all of it anew.

    Raises ConfigError, DataError or EnvironmentProblem; parts that were whole then are kept.
    """
    if max_seq_length < MIN_LENGTH:
        raise ConfigError(f"max_seq_length={max_seq_length} must be at least {MIN_LENGTH}.")
    if not 0 <= val_ratio < 1:
        raise ConfigError(f"val_ratio={val_ratio} must be at least 0 and less than 1.")
    if skip_existing and force:
        raise ConfigError("Either --skip-existing or --force: they say the opposite.")
    source, output = Path(source), Path(output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; choose another output.")
    units = find(source, recursive)
    used = load_tokenizer(tokenizer or os.environ.get("LLAMA_TOKENIZER") or TOKENIZER)
    begin = beginning(used)
    options = {
        "max_seq_length": max_seq_length,
        "val_ratio": val_ratio,
        "tokenizer": used.fingerprint,
        "beginning": begin,
    }
    with artifacts.locked(output, "the chunks in"):
        _clear(output, units, force)
        todo = []
        for unit in units:
            inputs = unit.inputs()
            if force or not artifacts.is_current(output / unit.folder, PART, inputs, options):
                todo.append((unit, inputs))
        if todo:
            (output / artifacts.MANIFEST).unlink(missing_ok=True)  # it no longer describes it
            used.save(output)
        size = sum(os.path.getsize(file.path) for unit, _ in todo for file in unit.files)
        count = min(workers or os.cpu_count() or 1, 1 + size // (4 * TASK_CHARACTERS))
        with ExitStack() as stack:
            pool = stack.enter_context(process_pool(count))
            _loaded[used.fingerprint] = used  # of this process
            stack.callback(_loaded.clear)
            advance = stack.enter_context(progress("pack", None, "documents"))
            for unit, inputs in todo:
                _make(unit, inputs, options, used, output, pool, advance)
        counts = _seal(output, units, options, used, source)
    return Packed(output, counts, len(todo), len(units) - len(todo))


def find(source: Path, recursive: bool) -> list[Unit]:
    """What is in ``source``, in the order of the names."""
    if not source.exists():
        raise DataError(
            f"{source} does not exist. Name a folder or file of JSONL or parquet, such as "
            "`thimble data download --plan poc` leaves in data/distillation."
        )
    source = source.resolve()
    if source.is_file() or recursive:
        files = local.find([source])
        inside = f"{source.name}/"  # so that a folder may be renamed
        files = [UserFile(file.path, file.name.removeprefix(inside)) for file in files]
    else:
        here = [p for p in sorted(source.iterdir()) if p.is_file() and not p.name.startswith(".")]
        if not here:
            raise DataError(
                f"There are no files in {source} itself. Those of the folders in it: --recursive."
            )
        files = local.find(here)
    units: dict[str, list[UserFile]] = {}
    for file in files:
        # No file is called "/": the name of a folder's texts is that of nothing else.
        plain = file.ending in local.PLAIN
        name = f"{Path(file.name).parent.as_posix()}/" if plain else file.name
        units.setdefault(name, []).append(file)
    return [Unit(name, tuple(each)) for name, each in units.items()]


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The ids that this tokenizer puts before every text, such as Llama's begin-of-text."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        from thimble.conversations.template import special_id

        found = special_id(tokenizer, "bos")
        return [] if found is None else [found]
    whole = tokenizer.backend.encode("a", add_special_tokens=True).ids
    bare = tokenizer.backend.encode("a", add_special_tokens=False).ids
    places = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in places if whole[i : i + len(bare)] == bare), 0)]


def _clear(output: Path, units: list[Unit], force: bool) -> None:
    """Remove the parts whose input is gone; refuse when that would be all of another input."""
    names = {unit.folder for unit in units}
    parts = [
        path.parent
        for path in sorted(output.glob(f"*/{artifacts.MANIFEST}"))
        if artifacts.read_json(path).get("kind") == PART
    ]
    others = [path for path in output.iterdir() if not path.name.startswith(".")]
    if others and not parts and not (output / artifacts.MANIFEST).is_file():
        ours = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
        if strange := [path.name for path in others if path.name not in ours]:
            raise ConfigError(
                f"{output} holds something else ({', '.join(strange[:3])}); choose another output."
            )
    gone = [path for path in parts if path.name not in names]
    if gone and len(gone) == len(parts) and not force:
        raise ConfigError(
            f"{output} holds chunks of other input ({gone[0].name}). Choose another output, or "
            "replace them with --force."
        )
    for path in gone:
        log.info("%s is removed: its input is gone", path)
        (output / artifacts.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def _make(
    unit: Unit,
    inputs: list[dict[str, str]],
    options: dict[str, Any],
    tokenizer: Tokenizer,
    output: Path,
    pool: Any,
    advance: Callable[[float], None],
) -> None:
    """One folder of shards."""
    notes: Counter[str] = Counter()
    counts = Counter({"empty": 0})
    length, pad = options["max_seq_length"], pad_id(tokenizer)
    held_out = np.uint64(int(options["val_ratio"] * 2**64))
    with artifacts.atomic_directory(output / unit.folder) as out:
        with ExitStack() as stack:
            writers = [stack.enter_context(ChunkWriter(out, s, length, pad)) for s in SPLITS]
            tasks = _tasks(unit, notes, output, tokenizer.fingerprint, options["beginning"])
            for ids, lengths, hashes, empty in in_order(pool, _encode, tasks):
                counts["empty"] += empty
                in_val = hashes < held_out
                for writer, mine in zip(writers, (~in_val, in_val), strict=True):
                    if mine.any():
                        chosen = ids if mine.all() else ids[np.repeat(mine, lengths)]
                        writer.append(chosen, lengths[mine], hashes[mine])
                advance(len(lengths))
            for writer in writers:
                writer.finish()
        artifacts.write_manifest(
            out,
            PART,
            inputs=inputs,
            options=options,
            counts={
                **{split: w.counts for split, w in zip(SPLITS, writers, strict=True)},
                "empty": counts["empty"],
                "refused": notes[local.REFUSED],
            },
            packages=("tokenizers", "sentencepiece", "pyarrow", "numpy"),
            source=unit.name,
        )


def _seal(
    output: Path, units: list[Unit], options: dict[str, Any], used: Tokenizer, source: Path
) -> dict[str, Any]:
    """The manifest over all parts; their files were hashed when they were written."""
    parts = {}
    files: dict[str, Any] = {
        path.name: {"bytes": path.stat().st_size, "sha256": artifacts.sha256_file(path)}
        for path in sorted(output.iterdir())  # the tokenizer's
        if path.is_file() and not path.name.startswith(".") and path.name != artifacts.MANIFEST
    }
    totals: dict[str, Any] = {s: Counter() for s in SPLITS} | {"empty": 0, "refused": 0}
    for unit in units:
        manifest = artifacts.read_manifest(output / unit.folder, PART, make="")
        parts[unit.folder] = {"source": unit.name, "fingerprint": manifest["fingerprint"]}
        files |= {f"{unit.folder}/{name}": facts for name, facts in manifest["files"].items()}
        for name, count in manifest["counts"].items():
            totals[name] += Counter(count) if isinstance(count, dict) else count
    keys = ("documents", "tokens", "chunks", "padding")
    counts = totals | {s: {key: totals[s][key] for key in keys} for s in SPLITS}
    if not counts["train"]["chunks"]:
        raise DataError(
            f"{source} holds {counts['val']['documents']:,} documents and {counts['empty']:,} "
            "empty ones, and none for training. Use more text, or a lower --val-ratio."
        )
    artifacts.write_manifest(
        output,
        KIND,
        inputs=parts,
        options=options,
        counts=counts,
        packages=("tokenizers", "sentencepiece", "pyarrow", "numpy"),
        files=files,
        max_seq_length=options["max_seq_length"],
        vocab_size=used.vocab_size,
        eot_id=used.eot_id,
        pad_id=pad_id(used),
        tokenizer={"fingerprint": used.fingerprint},
        labels="input_ids, and -100 where attention_mask is 0; the loader shifts them",
    )
    return counts


def pad_id(tokenizer: Tokenizer) -> int:
    """What stands where ``attention_mask`` is 0; any id would do."""
    return tokenizer.eot_id if tokenizer.pad_id is None else tokenizer.pad_id


# ------------------------------------------------------------------------------------- documents


def _tasks(
    unit: Unit, notes: Counter[str], folder: Path, fingerprint: str, begin: list[int]
) -> Iterator[tuple]:
    """The texts of a unit in order, so many at a time that a process has something to do."""
    texts: list[str] = []
    characters = 0
    for file in unit.files:
        for document in local.documents(file, notes):
            texts.append(document.text)
            characters += len(document.text)
            if characters >= TASK_CHARACTERS or len(texts) >= TASK_DOCUMENTS:
                yield folder, fingerprint, begin, texts
                texts, characters = [], 0
    if texts:
        yield folder, fingerprint, begin, texts


_loaded: dict[str, Tokenizer] = {}  # of this process, by fingerprint


def _encode(
    folder: Path, fingerprint: str, begin: list[int], texts: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Ids end to end, tokens of each document, hash of each, and how many were empty."""
    if fingerprint not in _loaded:
        _loaded.clear()
        _loaded[fingerprint] = load_tokenizer(folder)
    said = [text for text in texts if text.strip()]
    ids, lengths = _loaded[fingerprint].pack(said)
    ids = ids.astype(np.int32)
    if begin:
        starts = np.cumsum(lengths) - lengths
        ids = np.insert(ids, np.repeat(starts, len(begin)), np.tile(begin, len(said)))
        lengths = lengths + len(begin)
    hashes = np.array([splits.text_hash(text) for text in said], dtype=np.uint64)
    return ids, lengths, hashes, len(texts) - len(said)


# ---------------------------------------------------------------------------------------- chunks


class ChunkWriter(ExitStack):
    """Cuts a split's stream of documents into chunks; holds one row group of them and no more."""

    def __init__(self, directory: Path, split: str, length: int, pad: int) -> None:
        super().__init__()
        self.directory, self.split, self.length, self.pad = directory, split, length, pad
        self.group = max(GROUP_TOKENS // length, 1)  # chunks of a row group
        self.counts = {"documents": 0, "tokens": 0, "chunks": 0, "padding": 0}
        self.waiting: list[np.ndarray] = []
        self.begin = 0  # place in the stream of the first token that waits
        self.starts = np.zeros(0, dtype=np.int64)  # of documents, from the one at ``begin`` on
        self.hashes = np.zeros(0, dtype=np.uint64)
        self.file: Any = None
        self.shards = self.in_shard = 0

    def append(self, ids: np.ndarray, lengths: np.ndarray, hashes: np.ndarray) -> None:
        """``ids``: documents one after the other; ``lengths``, ``hashes``: of each."""
        starts = self.counts["tokens"] + np.cumsum(lengths) - lengths
        self.starts = np.concatenate([self.starts, starts])
        self.hashes = np.concatenate([self.hashes, hashes])
        self.waiting.append(ids)
        self.counts["documents"] += len(lengths)
        self.counts["tokens"] += len(ids)
        while self.counts["tokens"] - self.begin >= self.group * self.length:
            self._write(self.group)

    def finish(self) -> None:
        """Write what waits, the last chunk padded."""
        if full := (self.counts["tokens"] - self.begin) // self.length:
            self._write(full)
        if rest := self.counts["tokens"] - self.begin:
            self.counts["padding"] = self.length - rest
            self.waiting.append(np.full(self.length - rest, self.pad, dtype=np.int32))
            mask = (np.arange(self.length) < rest).astype(np.int8)
            self.close()
            self._write(1, mask)
        self.close()

    def _write(self, chunks: int, mask: np.ndarray | None = None) -> None:
        """One row group: the next ``chunks`` chunks."""
        size = chunks * self.length
        stream = np.concatenate(self.waiting)
        flat, self.waiting = stream[:size], [stream[size:]]
        edges = self.begin + np.arange(chunks + 1) * self.length
        last = min(edges[-1], self.counts["tokens"])
        inside = self.starts[(self.starts >= self.begin) & (self.starts < last)]
        places = np.union1d(inside, edges[:-1])
        hashes = self.hashes[np.searchsorted(self.starts, places, side="right") - 1]
        offsets = pyarrow.array(np.searchsorted(places, edges).astype(np.int32))
        columns = [
            _fixed(flat, self.length, pyarrow.int32()),
            pyarrow.ListArray.from_arrays(
                offsets, pyarrow.array(((places - self.begin) % self.length).astype(np.int32))
            ),
            pyarrow.ListArray.from_arrays(offsets, pyarrow.array(hashes)),
        ]
        names = ["input_ids", "document_starts", "documents"]
        if mask is not None:
            columns.append(_fixed(mask, self.length, pyarrow.int8()))
            names.append("attention_mask")
        self._shard(pyarrow.table(columns, names=names), chunks)
        self.begin = int(edges[-1])
        going_on = max(int(np.searchsorted(self.starts, self.begin, side="right")) - 1, 0)
        self.starts, self.hashes = self.starts[going_on:], self.hashes[going_on:]
        self.counts["chunks"] += chunks

    def _shard(self, table: pyarrow.Table, chunks: int) -> None:
        if self.file is None or (self.in_shard + chunks) * self.length > SHARD_TOKENS:
            self.close()
            path = self.directory / f"{self.split}-{self.shards:05d}.parquet"
            writer = pyarrow.parquet.ParquetWriter(path, table.schema, compression="snappy")
            self.file, self.in_shard = self.enter_context(writer), 0
            self.shards += 1
        self.file.write_table(table, row_group_size=chunks)
        self.in_shard += chunks

    def close(self) -> None:
        super().close()
        self.file = None


def _fixed(flat: np.ndarray, length: int, kind: pyarrow.DataType) -> pyarrow.Array:
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat, type=kind), length)
