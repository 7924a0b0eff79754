"""Which example comes when, as a function of seed and place.

In an epoch every group gives one of its puzzles, drawn anew, with all its examples. The order of an
epoch depends on the seed and the epoch alone, so a place is two numbers, and any place is found
without going through what comes before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thimble import artifacts
from thimble.errors import ConfigError, DataError
from thimble.puzzles.dataset import FIELDS, MAKE, Metadata

IGNORE = -100  # what cross entropy passes over
_checked: set[tuple[object, ...]] = set()  # files whose values were looked at by this process


@dataclass(frozen=True)
class Rows:
    """``n`` examples: inputs and labels [n, seq_len], puzzle_identifiers [n], all int64.

    Labels are -100 where they do not count. ``examples`` [n]: row numbers in the split, -1 for a
    row that only fills up a batch.
    """

    inputs: np.ndarray
    labels: np.ndarray
    puzzle_identifiers: np.ndarray
    examples: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where a stream stands: ``offset`` examples of ``epoch`` were given."""

    epoch: int = 0
    offset: int = 0


class Split:
    """One split of a data set, its examples left on disk until they are asked for.

    What the HRM and TRM code bases wrote themselves is read too. Raises DataError when the folder
    is no such data set, or its arrays do not fit one another.
    """

    def __init__(self, dataset: str | Path, split: str) -> None:
        folder = Path(dataset) / split
        if not (folder / "dataset.json").is_file():
            raise DataError(f"There are no puzzles at {folder}. Make some with:\n  {MAKE}")
        self.metadata = Metadata.read(folder)
        arrays = {}
        for name in FIELDS:
            path = folder / f"all__{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path} is missing or damaged: {error}.") from error
        self.inputs, self.labels = arrays["inputs"], arrays["labels"]
        self.puzzle_identifiers = arrays["puzzle_identifiers"]
        self.puzzles, self.groups = (arrays[name].astype(np.int64) for name in FIELDS[3:])
        shape = (int(self.puzzles[-1]), self.metadata.seq_len)
        for name in ("inputs", "labels"):
            if arrays[name].shape != shape:
                raise DataError(
                    f"{folder}/all__{name}.npy has shape {list(arrays[name].shape)}, and by "
                    f"dataset.json and all__puzzle_indices.npy it should have {list(shape)}: the "
                    f"files of {folder} do not fit one another. Build the data set again:\n  {MAKE}"
                )
        if self.groups[-1] != len(self.puzzle_identifiers):
            raise DataError(
                f"{folder}/all__group_indices.npy ends at puzzle {self.groups[-1]:,} of "
                f"{len(self.puzzle_identifiers):,}: the files of {folder} do not fit one another. "
                f"Build the data set again:\n  {MAKE}"
            )
        for name, array in arrays.items():
            if name in ("inputs", "labels", "puzzle_identifiers"):
                self._check_values(folder / f"all__{name}.npy", array)
        self.sizes = np.diff(self.puzzles)
        manifest = Path(dataset) / artifacts.MANIFEST
        made = artifacts.read_json(manifest) if manifest.is_file() else {}
        # A data set of another program has neither: its shape and first rows must do.
        self.kind: str | None = made.get("options", {}).get("puzzle")
        self.fingerprint: str = made.get("fingerprint") or artifacts.fingerprint(
            [vars(self.metadata), list(shape), np.asarray(self.inputs[:64]).tolist()]
        )

    def _check_values(self, path: Path, array: np.ndarray) -> None:
        """No value beyond its alphabet; on a GPU one would end the process without a word."""
        puzzles = path.name == "all__puzzle_identifiers.npy"
        known = self.metadata.num_puzzle_identifiers if puzzles else self.metadata.vocab_size
        status = path.stat()
        key = (path.absolute(), status.st_mtime_ns, status.st_size, known)
        if key in _checked:
            return
        least = -100 if path.name == "all__labels.npy" else 0  # -100: another program's IGNORE
        for start in range(0, len(array), 1 << 16):
            rows = array[start : start + (1 << 16)]
            wrong = np.argwhere((rows < least) | (rows >= known))
            if len(wrong):
                place = tuple(wrong[0])
                raise DataError(
                    f"{path}, row {start + int(place[0]):,}, has the value {int(rows[place])}, and "
                    f"dataset.json allows 0 to {known - 1}. Build the data set again:\n  {MAKE}"
                )
        _checked.add(key)

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, examples: np.ndarray) -> Rows:
        """The examples of these numbers; -1 gives a row of padding with the blank identifier."""
        metadata = self.metadata
        real = examples >= 0
        shape = (len(examples), metadata.seq_len)
        inputs = np.full(shape, metadata.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        identifiers = np.full(len(examples), metadata.blank_identifier_id, dtype=np.int64)
        inputs[real] = self.inputs[examples[real]]
        labels[real] = self.labels[examples[real]]
        if metadata.ignore_label_id is not None:
            labels[labels == metadata.ignore_label_id] = IGNORE
        places = np.searchsorted(self.puzzles, examples[real], side="right") - 1
        identifiers[real] = self.puzzle_identifiers[places]
        return Rows(inputs, labels, identifiers, examples)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The examples of an epoch: groups shuffled, of each one puzzle, its examples shuffled."""
        draw = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        first, end = self.groups[:-1], self.groups[1:]
        chosen = draw.integers(first, end)[draw.permutation(len(first))]
        sizes = self.sizes[chosen]
        before = np.repeat(np.cumsum(sizes) - sizes, sizes)
        inside = np.arange(sizes.sum()) - before
        examples = np.repeat(self.puzzles[chosen], sizes) + inside
        # Sorting random numbers within each puzzle shuffles it and leaves the puzzles in order.
        return examples[np.lexsort((draw.random(len(examples)), before))]


class Stream:
    """The training examples without end, so many at a time as are wanted.

    A model that takes finished rows out of its batch asks for exactly as many as are free; what
    comes is the same however the calls are cut. ``place`` is all there is to save; a stream made
    from it goes on there. Of several ``processes`` each gives ``rank`` and has every so-many-th
    example of the one order.
    """

    def __init__(
        self, split: Split, seed: int, place: Place | None = None, rank: int = 0, processes: int = 1
    ) -> None:
        if not len(split):
            raise DataError("The split has no examples.")
        self.split, self.seed, self.rank, self.processes = split, seed, rank, processes
        self.place = place or Place()
        self._enter(self.place.epoch)
        if not 0 <= self.place.offset <= len(self._order):
            raise ConfigError(f"Epoch {self.place.epoch} has no place {self.place.offset}.")

    def _enter(self, epoch: int) -> None:
        self._order = self.split.order(self.seed, epoch)[self.rank :: self.processes]
        if not len(self._order):
            raise ConfigError(f"{self.processes} processes are more than the examples of an epoch.")

    def rows(self, count: int) -> Rows:
        """The next ``count`` examples."""
        return self.split.rows(self.take(count))

    def take(self, count: int) -> np.ndarray:
        """The numbers of the next ``count`` examples."""
        taken = []
        epoch, offset = self.place.epoch, self.place.offset
        while count:
            if offset == len(self._order):
                epoch, offset = epoch + 1, 0
                self._enter(epoch)
            taken.append(self._order[offset : offset + count])
            offset += len(taken[-1])
            count -= len(taken[-1])
        self.place = Place(epoch, offset)
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)


def evaluation_batches(
    split: Split, size: int, rank: int = 0, processes: int = 1
) -> Iterator[Rows]:
    """Every example of a split once, in batches of ``size`` rows.

    The last batch is filled up with rows that do not count (``examples`` -1), so all batches have
    one shape, and all processes the same number of them.
    """
    if size < 1:
        raise ConfigError(f"A batch has at least one row, not {size}.")
    batches = -(-len(split) // (size * processes))
    numbers = np.full(batches * processes * size, -1, dtype=np.int64)
    numbers[: len(split)] = np.arange(len(split))
    for batch in numbers.reshape(batches, processes, size)[:, rank]:
        yield split.rows(batch)
