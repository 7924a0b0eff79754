"""Packed chunks as batches for training, in an order that is a function of seed and place.

The order of an epoch has two levels, so that each row group is decoded about once: the row groups
are permuted, and the chunks of every ``WINDOW`` of them that follow one another are permuted among
themselves. Any place is found at once, as in ``thimble.tokens.loader``.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from thimble import artifacts
from thimble.console import log
from thimble.errors import DataError
from thimble.tokens.loader import permute
from thimble.tokens.packing import KIND, SPLITS

MAKE = "thimble tokens pack --input DIR --output DIR --recursive"
WINDOW = 32  # row groups whose chunks are mixed; twice as many are held decoded
IGNORED = -100


def next_token_targets(labels: np.ndarray) -> np.ndarray:
    """Labels [B, T], each at the place of its own token, as what each place is to predict [B, T].

    The one place where labels are shifted. transformers' models shift by themselves: give them
    ``labels``, never this.
    """
    targets = np.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets


@dataclass(frozen=True)
class Batch:
    """``B`` chunks of ``T`` tokens."""

    inputs: np.ndarray  # int64 [B, T]
    labels: np.ndarray  # int64 [B, T]: the inputs, or -100 where nothing is to be learned
    starts: np.ndarray  # bool [B, T]: a document begins, or goes on from another chunk
    numbers: np.ndarray  # int64 [B]: places in the data set, which no order changes

    @property
    def targets(self) -> np.ndarray:
        """What each position is to predict, int64 [B, T]; -100 for nothing."""
        return next_token_targets(self.labels)


class Group(NamedTuple):
    """A row group, decoded: R chunks."""

    ids: np.ndarray  # int32 [R, T]
    labels: np.ndarray | None  # int32 [R, T] where they are not the ids
    offsets: np.ndarray  # int32 [R + 1] into ``starts``
    starts: np.ndarray  # int32: positions in their chunks


class PackedChunks:
    """A split of packed chunks (both where ``split`` is None), read a row group at a time.

    ``length``: the tokens of a chunk that are expected. ``exclude``: hashes of documents whose
    labels are left out. Raises DataError when the folder is missing, when manifest and shards do
    not agree, and for another length.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str | None = "train",
        *,
        seed: int = 0,
        length: int | None = None,
        exclude: np.ndarray | None = None,
    ) -> None:
        self.directory, self.split, self.seed = Path(directory), split, seed
        self.exclude = exclude
        self.manifest = artifacts.read_manifest(self.directory, KIND, make=MAKE)
        if problems := artifacts.damaged_files(self.directory, self.manifest, hashes=False):
            raise DataError(f"{self.directory}: {problems[0]}. Make it again with:\n  {MAKE}")
        try:
            self.length: int = self.manifest["max_seq_length"]
            self.vocab_size: int = self.manifest["vocab_size"]
            self.eot_id: int = self.manifest["eot_id"]
            counts = [self.manifest["counts"][name] for name in ([split] if split else SPLITS)]
            self.count: int = sum(each["chunks"] for each in counts)
            self.tokens: int = sum(each["tokens"] for each in counts)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.directory / artifacts.MANIFEST} does not say {error}. Make it again with:"
                f"\n  {MAKE}"
            ) from error
        if length not in (None, self.length):
            raise DataError(
                f"{self.directory} has chunks of {self.length:,} tokens, not of {length:,}. Pack "
                f"the text again, or take the chunks as they are:\n  {MAKE} --max-seq-length "
                f"{length}\n  training.sequence_length={self.length}"
            )
        self._open([f"{name}-" for name in ([split] if split else SPLITS)])
        if not self.count:
            raise DataError(
                f"{self.directory} has no {split or 'chunks'}. Pack more text"
                f"{', or hold out more with --val-ratio' if split == 'val' else ''}."
            )
        self.decoded: OrderedDict[int, Group] = OrderedDict()

    def _open(self, prefixes: list[str]) -> None:
        """The table of row groups, held against the manifest."""
        self.files: list[Any] = []
        self.names: list[str] = []
        rows, places = [], []
        for name in sorted(self.manifest["files"]):
            shard = name.rsplit("/", 1)[-1]
            if not (shard.endswith(".parquet") and shard.startswith(tuple(prefixes))):
                continue
            file = open_shard(self.directory / name, self.length)
            for index in range(file.num_row_groups):
                rows.append(file.metadata.row_group(index).num_rows)
                places.append((len(self.files), index))
            self.files.append(file)
            self.names.append(name)
        if sum(rows) != self.count:
            raise DataError(
                f"The shards of {self.directory} have {sum(rows):,} chunks, its manifest says "
                f"{self.count:,}. Make it again with:\n  {MAKE}"
            )
        self.places = places
        self.ends = np.cumsum(rows, dtype=np.int64)
        self.sizes = np.array(rows, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    # ------------------------------------------------------------------------------- the order

    def order(self, start: int, count: int) -> np.ndarray:
        """Chunk numbers at places ``start .. start + count`` of the endless sequence of epochs."""
        place = np.arange(start, start + count)
        epochs, offsets = place // self.count, place % self.count
        numbers = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            groups, ends, blocks = self._epoch(int(epoch))
            key = self.seed * 1_000_003 + int(epoch)
            chosen = np.flatnonzero(epochs == epoch)
            block = np.searchsorted(blocks, offsets[chosen], side="right") - 1
            for value in np.unique(block):
                first, size = int(blocks[value]), int(blocks[value + 1] - blocks[value])
                mine = chosen[block == value]
                mixed = first + permute(offsets[mine] - first, size, key * 1_000_003 + int(value))
                at = np.searchsorted(ends, mixed, side="right")
                inside = mixed - (ends[at] - self.sizes[groups[at]])
                numbers[mine] = self.ends[groups[at]] - self.sizes[groups[at]] + inside
        return numbers

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row groups of an epoch in order, where each ends, and where the windows of them begin."""
        return _epoch(self.sizes.tobytes(), self.seed * 1_000_003 + epoch)

    def batch(self, seen: int, size: int) -> Batch:
        """The ``size`` chunks after the first ``seen``."""
        return self.rows(self.order(seen, size))

    # ----------------------------------------------------------------------------- the chunks

    def rows(self, numbers: np.ndarray) -> Batch:
        """The chunks with these numbers, each in [0, count)."""
        shape = (len(numbers), self.length)
        inputs, labels = np.empty(shape, np.int64), np.empty(shape, np.int64)
        starts = np.zeros(shape, dtype=bool)
        which = np.searchsorted(self.ends, numbers, side="right")
        inside = numbers - (self.ends[which] - self.sizes[which])
        for row, (group_number, place) in enumerate(zip(which, inside, strict=True)):
            group = self._group(int(group_number))
            inputs[row] = group.ids[place]
            labels[row] = inputs[row] if group.labels is None else group.labels[place]
            starts[row, group.starts[group.offsets[place] : group.offsets[place + 1]]] = True
        return Batch(inputs, labels, starts, np.asarray(numbers, dtype=np.int64))

    def document_hashes(self) -> np.ndarray:
        """Hashes of all documents of which there is something here, uint64, sorted, each once."""
        found = [np.zeros(0, dtype=np.uint64)]
        for file, name in zip(self.files, self.names, strict=True):
            table = self._read(file, name, None, ["documents"])
            found.append(table["documents"].combine_chunks().flatten().to_numpy())
        return np.unique(np.concatenate(found))

    def _group(self, number: int) -> Group:
        if number in self.decoded:
            self.decoded.move_to_end(number)
            return self.decoded[number]
        file, index = self.places[number]
        group = self._decode(self.files[file], self.names[file], index)
        self.decoded[number] = group
        if len(self.decoded) > 2 * WINDOW:
            self.decoded.popitem(last=False)
        return group

    def _read(self, file: Any, name: str, index: int | None, columns: list[str]) -> Any:
        try:
            if index is None:
                return file.read(columns, use_threads=False)
            return file.read_row_group(index, columns, use_threads=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{self.directory / name} is damaged: {error}. Make it again with:\n  {MAKE}"
            ) from error

    def _decode(self, file: Any, name: str, index: int) -> Group:
        wanted = ["input_ids", "document_starts", "labels", "attention_mask"]
        if self.exclude is not None:
            wanted.append("documents")
        there = file.schema_arrow.names
        table = self._read(file, name, index, [column for column in wanted if column in there])
        ids = self._fixed(table, "input_ids")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise DataError(
                f"{self.directory / name} has ids outside of its vocabulary of "
                f"{self.vocab_size:,}. It is damaged; make it again with:\n  {MAKE}"
            )
        begins = table["document_starts"].combine_chunks()
        offsets, starts = begins.offsets.to_numpy(), begins.flatten().to_numpy()
        offsets = offsets - offsets[0]
        labels = self._fixed(table, "labels") if "labels" in there else None
        if "attention_mask" in there:
            padding = self._fixed(table, "attention_mask") == 0
            labels = np.where(padding, IGNORED, ids if labels is None else labels)
        if self.exclude is not None:
            hashes = table["documents"].combine_chunks().flatten().to_numpy()
            if (out := np.isin(hashes, self.exclude)).any():
                chunk = np.repeat(np.arange(len(ids)), np.diff(offsets))
                places = chunk * self.length + starts
                left_out = np.repeat(out, np.diff(np.append(places, ids.size))).reshape(ids.shape)
                labels = np.where(left_out, IGNORED, ids if labels is None else labels)
        return Group(ids, labels, offsets, starts)

    def _fixed(self, table: Any, name: str) -> np.ndarray:
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, self.length)


@functools.lru_cache(maxsize=8)
def _epoch(sizes: bytes, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    of_group = np.frombuffer(sizes, dtype=np.int64)
    groups = permute(np.arange(len(of_group)), len(of_group), key)
    ends = np.cumsum(of_group[groups])
    blocks = np.append(
        0, ends[np.minimum(np.arange(WINDOW, len(ends) + WINDOW, WINDOW), len(ends)) - 1]
    )
    return groups, ends, blocks


def open_shard(path: Path, length: int) -> Any:
    """A shard, mapped into memory. DataError when it has not the columns it should have."""
    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is damaged: {error}. Make it again with:\n  {MAKE}") from error
    there = file.schema_arrow.names
    wanted = ("input_ids", "document_starts", "documents")
    if missing := [name for name in wanted if name not in there]:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(there)}. Make it again "
            f"with:\n  {MAKE}"
        )
    kind = file.schema_arrow.field("input_ids").type
    if getattr(kind, "list_size", None) != length:
        raise DataError(
            f"{path} has input_ids of type {kind}, not {length} in each chunk. Make it again with:"
            f"\n  {MAKE}"
        )
    return file


def train_and_validation(
    train: str | Path, val: str | Path, *, seed: int = 0, length: int | None = None
) -> tuple[PackedChunks, PackedChunks]:
    """What to train on and what to judge by, with no document in both.

    The same folder for both (or its copy) gives its two splits. Of another folder everything is for
    validation except the documents, by the hash of their text, that are trained on. Raises
    DataError when nothing is left, or when the two were made with different tokenizers.
    """
    training = PackedChunks(train, "train", seed=seed, length=length)
    found = artifacts.read_manifest(val, KIND, make=MAKE)
    if found["fingerprint"] == training.manifest["fingerprint"]:
        return training, PackedChunks(val, "val", seed=seed, length=length)
    validation = PackedChunks(val, None, seed=seed, length=length)
    mine, theirs = training.manifest["tokenizer"], validation.manifest["tokenizer"]
    if mine != theirs:
        raise DataError(
            f"{train} and {val} were packed with different tokenizers, so their ids mean "
            "different text. Pack one of them again with the other's --tokenizer."
        )
    trained_on, held_out = training.document_hashes(), validation.document_hashes()
    common = np.intersect1d(trained_on, held_out, assume_unique=True)
    if len(common) == len(held_out):
        raise DataError(
            f"All {len(held_out):,} documents of {val} are trained on in {train}. Hold out others, "
            "or name the same folder for both: it is split."
        )
    if len(common):
        log.warning(
            "%s of %s documents of %s are trained on in %s; they do not count in validation",
            *(f"{len(common):,}", f"{len(held_out):,}", val, train),
        )
        validation.exclude = common
    return training, validation
