"""What a recursive model's batch is filled with: the next examples, as many as there are free rows.

take(count) -> numbers of examples -> rows(numbers) -> ``act.Rows`` and their lengths
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from thimble.config.schema import Config
from thimble.conversations.batches import MULTIPLE, Batches, gather
from thimble.conversations.dataset import Conversations
from thimble.objectives.act import Rows
from thimble.puzzles.loader import Place, Split, Stream


class Feed(Protocol):
    """The training examples in the order of a run.

    ``per_epoch``: examples of an epoch; ``total``: of the whole run, None where steps end it;
    ``place``: examples given out.
    """

    per_epoch: int
    total: int | None

    @property
    def place(self) -> int: ...

    def take(self, count: int) -> np.ndarray:
        """The numbers of the next ``count`` examples; at the end of the run fewer, at last none."""

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """How many positions these examples have, int64 [N]."""

    def rows(self, numbers: np.ndarray) -> tuple[Rows, np.ndarray]:
        """These examples in main memory, and how many positions each has: int64 [N]."""

    def width(self, longest: int) -> int:
        """Positions of a batch whose longest example has ``longest``."""

    def cursor(self) -> dict[str, Any]:
        """The place, as ``seek`` takes it."""

    def seek(self, cursor: dict[str, Any]) -> None: ...


class ConversationFeed:
    """Conversations, neighbours of about equal length."""

    def __init__(self, data: Conversations, config: Config, batch_size: int) -> None:
        self.data = data
        epochs = config.training.max_epochs
        self.batches = Batches(data, batch_size=batch_size, seed=config.seed, epochs=epochs)
        self.per_epoch, self.total = self.batches.count, self.batches.total

    @property
    def place(self) -> int:
        return self.batches.place

    def take(self, count: int) -> np.ndarray:
        return self.batches.take(count)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return self.data.examples["length"][numbers].astype(np.int64) - 1

    def rows(self, numbers: np.ndarray) -> tuple[Rows, np.ndarray]:
        batch = gather(self.data, numbers)
        # The last token of the prompt has seen all of it and nothing of the answer.
        position = self.data.examples["prompt"][numbers].astype(np.int64) - 1
        rows = Rows(
            torch.from_numpy(batch.inputs),
            torch.from_numpy(batch.labels),
            torch.from_numpy(position),
            torch.zeros(len(numbers), dtype=torch.int64),
            torch.from_numpy(batch.weights),
        )
        return rows, batch.lengths

    def width(self, longest: int) -> int:
        # A process that has no example left computes with the others all the same.
        return min(-(-max(longest, 1) // MULTIPLE) * MULTIPLE, self.data.seq_len)

    def cursor(self) -> dict[str, Any]:
        return {"place": self.batches.place}

    def seek(self, cursor: dict[str, Any]) -> None:
        self.batches.place = cursor["place"]


class PuzzleFeed:
    """Puzzles, of each group one an epoch; all of the same length."""

    def __init__(self, split: Split, config: Config) -> None:
        self.split, self.stream = split, Stream(split, config.seed)
        self.per_epoch = len(split.order(config.seed, 0))
        epochs = config.training.max_epochs
        self.total = None if epochs is None else max(round(self.per_epoch * epochs), 1)
        self.given = 0

    @property
    def place(self) -> int:
        return self.given

    def take(self, count: int) -> np.ndarray:
        if self.total is not None:
            count = min(count, self.total - self.given)
        self.given += count
        return self.stream.take(count)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), self.split.metadata.seq_len)

    def rows(self, numbers: np.ndarray) -> tuple[Rows, np.ndarray]:
        found = self.split.rows(numbers)
        count = len(numbers)
        rows = Rows(
            torch.from_numpy(found.inputs),
            torch.from_numpy(found.labels),
            torch.full((count,), self.split.metadata.seq_len - 1),  # read by a causal model only
            torch.from_numpy(found.puzzle_identifiers),
            torch.ones(count),
        )
        return rows, self.lengths(numbers)

    def width(self, longest: int) -> int:
        return self.split.metadata.seq_len

    def cursor(self) -> dict[str, Any]:
        at = self.stream.place
        return {"place": self.given, "epoch": at.epoch, "offset": at.offset}

    def seek(self, cursor: dict[str, Any]) -> None:
        self.given = cursor["place"]
        place = Place(cursor["epoch"], cursor["offset"])
        self.stream = Stream(self.split, self.stream.seed, place)
