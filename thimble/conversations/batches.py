"""Which conversations a step sees: each once an epoch, in an order that needs no state.

The order is a function of seed, epoch and place. An epoch is a keyed permutation, cut into pools of
``POOL`` batches; within a pool the examples are sorted by length, cut into batches, and the batches
put in a keyed order again. So neighbours are of about equal length and padding is little, and any
place is found by looking at one pool. Nothing is dropped: an epoch's last batch may be shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from thimble.conversations.dataset import IGNORED, Conversations
from thimble.errors import DataError
from thimble.tokens.loader import permute

POOL = 128  # batches; more pad less, fewer mix lengths better
MULTIPLE = 8  # widths are rounded up to it, for matrix products and for fewer shapes


@dataclass(frozen=True)
class Batch:
    """``inputs`` and ``labels`` int64 [B, T]: label t is what follows input t, or -100.

    ``weights`` float32 [B] of the examples in the loss, ``lengths`` int64 [B] of their inputs,
    ``examples`` int64 [B], their numbers in the data set.
    """

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    examples: np.ndarray

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1 - float(self.lengths.sum()) / max(self.inputs.size, 1)


def gather(data: Conversations, numbers: np.ndarray, *, width: int | None = None) -> Batch:
    """These examples of a data set, shifted by one and padded on the right."""
    rows = data.examples[numbers]
    lengths = rows["length"].astype(np.int64) - 1
    longest = int(lengths.max()) if len(lengths) else 0
    if width is None:
        width = -(-longest // MULTIPLE) * MULTIPLE
    elif width < longest:
        raise ValueError(f"an example of {longest} inputs does not fit into {width}")
    inputs = np.full((len(rows), width), data.pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
        ids, labelled = data.example(int(number))
        inputs[row, :length] = ids[:-1]
        # As int64 first: among unsigned ids there is no -100.
        labels[row, :length] = np.where(labelled[1:], ids[1:].astype(np.int64), IGNORED)
    return Batch(inputs, labels, rows["weight"].copy(), lengths, np.asarray(numbers))


def _left_out(data: Conversations) -> str:
    """How many more there would be if they were allowed to be longer; empty when there are none."""
    count = data.counts.get("left_out", 0)
    if not count:
        return ""
    return f" {count:,} more are left out: dataset.seq_len={data.seq_len} leaves them no answer."


class Batches:
    """The examples of a split in their order; ``place`` counts those given out, over all epochs.

    ``epochs`` None: without end.

    Setting ``place`` goes on from there: with the same seed and batch size, what comes next depends
    on nothing else. Raises DataError when training would have no whole batch.
    """

    def __init__(
        self,
        data: Conversations,
        split: str = "train",
        *,
        batch_size: int,
        seed: int = 0,
        epochs: float | None = 1,
        place: int = 0,
    ) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.epochs, self.place = epochs, place
        self.numbers = data.split(split)
        self.count = len(self.numbers)
        if not self.count or (split == "train" and self.count < batch_size):
            raise DataError(
                f"No {split} batch: the {split} split of {data.directory} has {self.count:,} "
                f"conversations, and a batch takes {batch_size:,}.{_left_out(data)} Use more data "
                "(dataset.subset_size), or a smaller batch:\n"
                f"  global_batch_size={max(self.count, 1)}"
            )
        self.pool: tuple[int, int, np.ndarray] | None = None  # epoch, number and order of the last

    @property
    def total(self) -> int | None:
        """Examples of all epochs; None when there is no end of them."""
        return None if self.epochs is None else max(round(self.count * self.epochs), 1)

    def left(self, count: int) -> int:
        """How many of the next ``count`` examples there are."""
        return count if self.total is None else max(min(count, self.total - self.place), 0)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.count // self.batch_size)

    def order(self, start: int, count: int) -> np.ndarray:
        """Numbers of the examples at places ``start .. start + count``, int64 [count]."""
        found = []
        size = POOL * self.batch_size
        while count > 0:
            epoch, offset = divmod(start, self.count)
            pool, within = divmod(offset, size)
            taken = self._pool(epoch, pool)[within : within + count]
            found.append(taken)
            start, count = start + len(taken), count - len(taken)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _pool(self, epoch: int, number: int) -> np.ndarray:
        if self.pool is None or self.pool[:2] != (epoch, number):
            size = POOL * self.batch_size
            places = np.arange(number * size, min((number + 1) * size, self.count))
            key = self.seed * 1_000_003 + epoch
            chosen = self.numbers[permute(places, self.count, key)]
            whole = len(chosen) // self.batch_size * self.batch_size
            lengths = self.data.examples["length"][chosen[:whole]]
            rows = chosen[:whole][np.argsort(lengths, kind="stable")].reshape(-1, self.batch_size)
            if whole:
                rows = rows[permute(np.arange(len(rows)), len(rows), key * 1_000_003 + number + 1)]
            self.pool = epoch, number, np.concatenate([rows.ravel(), chosen[whole:]])
        return self.pool[2]

    def batch(self, size: int | None = None, *, width: int | None = None) -> Batch:
        """The next ``size`` examples (default: ``batch_size``); fewer at the end of an epoch."""
        return self.rows(
            min(size or self.batch_size, self.count - self.place % self.count), width=width
        )

    def rows(self, count: int, *, width: int | None = None) -> Batch:
        """The next ``count`` examples, across epochs; fewer, and at last none, at the very end.

        ``width``: positions to pad to, for a model that keeps other rows; default as few as fit.
        """
        return gather(self.data, self.take(count), width=width)

    def take(self, count: int) -> np.ndarray:
        """The numbers of what ``rows`` would give."""
        count = self.left(count)
        found = self.order(self.place, count)
        self.place += count
        return found

    def __iter__(self) -> Iterator[Batch]:
        while self.left(1):
            yield self.batch()

    def padding(self, epoch: int = 0) -> dict[str, float]:
        """Share of positions without a token over an epoch of ``batch``; and at fixed width."""
        lengths = self.data.examples["length"][self.order(epoch * self.count, self.count)] - 1
        short = -len(lengths) % self.batch_size
        rows = np.pad(lengths.astype(np.int64), (0, short)).reshape(-1, self.batch_size)
        widths = -(-rows.max(axis=1) // MULTIPLE) * MULTIPLE
        sizes = np.full(len(rows), self.batch_size)
        sizes[-1] -= short
        used = float(lengths.sum())
        return {
            "bucketed": 1 - used / float((widths * sizes).sum()),
            "fixed_width": 1 - used / (self.data.seq_len * self.count),
        }
