"""Rows of tokens to train on, by number: windows of a token stream, or packed chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from thimble.evaluation.perplexity import perplexity
from thimble.tokens.loader import Windows
from thimble.tokens.packed import PackedChunks
from thimble.tokens.shards import TokenSplit


class Batch(NamedTuple):
    """``B`` rows of ``T`` tokens."""

    inputs: np.ndarray  # int64 [B, T]
    targets: np.ndarray  # int64 [B, T]: what follows each input, -100 for nothing to learn
    starts: np.ndarray  # bool [B, T]: a document begins
    numbers: np.ndarray  # int64 [B]: the rows' own, which no order changes


class TrainingRows(Protocol):
    """``count`` rows with ``tokens`` in all, in an order that is a function of seed and place.

    ``apart``: whether a teacher is told, too, where documents begin. ``end_id`` ends one.
    """

    count: int
    tokens: int
    end_id: int
    apart: bool

    def batch(self, seen: int, size: int) -> Batch:
        """The ``size`` rows after the first ``seen`` of the endless sequence of epochs."""

    def order(self, seen: int, size: int) -> np.ndarray:
        """Their numbers."""


class WindowRows:
    """Windows of a token stream; a document begins with the end of the one before it, since its
    first word is predicted from there, and so a text that is generated begins, too."""

    apart = False

    def __init__(self, data: TokenSplit, length: int, seed: int) -> None:
        self.windows = Windows(data.tokens, length, seed)
        self.count, self.tokens, self.end_id = self.windows.count, len(data.tokens), data.eot_id

    def batch(self, seen: int, size: int) -> Batch:
        numbers = self.order(seen, size)
        inputs, targets = self.windows.rows(numbers)
        return Batch(inputs, targets, inputs == self.end_id, numbers)

    def order(self, seen: int, size: int) -> np.ndarray:
        return self.windows.order(seen, size)


class ChunkRows:
    """Packed chunks, which know where their documents begin."""

    apart = True

    def __init__(self, chunks: PackedChunks) -> None:
        self.chunks, self.end_id = chunks, chunks.eot_id
        self.count, self.tokens = chunks.count, chunks.tokens

    def batch(self, seen: int, size: int) -> Batch:
        found = self.chunks.batch(seen, size)
        return Batch(found.inputs, found.targets, found.starts, found.numbers)

    def order(self, seen: int, size: int) -> np.ndarray:
        return self.chunks.order(seen, size)


def open_rows(data: TokenSplit | PackedChunks, length: int, seed: int) -> TrainingRows:
    """The rows of what ``data.open_data`` opened."""
    if isinstance(data, PackedChunks):
        return ChunkRows(data)
    return WindowRows(data, length, seed)


# Inputs, targets and starts [B, T] -> [B, T, 1 + n], or [B, T]: the loss and what is beside it.
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]


def evaluate_chunks(
    measure: Measure,
    chunks: PackedChunks,
    batch_size: int,
    max_tokens: int | None,
    device: torch.device,
    beside: list[str],
) -> dict[str, Any]:
    """What ``evaluation.perplexity.evaluate_split`` gives, of packed chunks: evenly chosen ones
    where ``max_tokens`` are fewer. Bytes are not known of them, so neither are bits per byte."""
    wanted = len(chunks)
    if max_tokens is not None:
        wanted = max(1, min(wanted, max_tokens // chunks.length))
    numbers = np.linspace(0, len(chunks) - 1, wanted).round().astype(np.int64)
    sums, count = np.zeros(1 + len(beside)), 0
    with torch.no_grad():
        for first in range(0, wanted, batch_size):
            # The last batch is filled up with rows in which nothing counts: one shape for all.
            mine = np.resize(numbers[first : first + batch_size], batch_size)
            batch = chunks.rows(mine)
            targets = batch.targets
            targets[wanted - first :] = -100
            parts = (torch.from_numpy(x).to(device) for x in (batch.inputs, targets, batch.starts))
            found = measure(*parts)
            sums = sums + found.reshape(targets.size, -1).double().sum(0).cpu().numpy()
            count += int((targets != -100).sum())
    means = sums / max(count, 1)
    return {
        "loss": float(means[0]),
        "perplexity": perplexity(float(means[0])),
        "tokens": count,
        **dict(zip(beside, map(float, means[1:]), strict=False)),
    }
