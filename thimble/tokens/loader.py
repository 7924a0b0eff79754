"""Which windows a step sees, as a function of seed and place, without any state to restore.

The token stream is cut into windows of ``sequence_length`` targets. Each epoch visits every window
once, in the order of a keyed permutation that can be evaluated at any place. So finding one's place
costs the same at step 10 and at step 10^6, and the order does not depend on how a step is split
into micro-batches or processes.
"""

from __future__ import annotations

import numpy as np

from thimble.errors import DataError

_ROUNDS = 6


def _mix(value: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit finaliser (the constants of splitmix64, Steele et al. 2014): every bit matters."""
    value = value + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Image of ``index`` (each in [0, size)) under a permutation of [0, size) chosen by ``key``.

    A Feistel network over the next even power of two; an image outside the range is sent through
    again until it falls inside (cycle walking), at most a few times on average.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix(right, key * _ROUNDS + round_) & mask)
        value[outside] = (left << shift) | right
        outside = value >= size
    return value.astype(np.int64)


class Windows:
    """A token stream as windows of ``length`` inputs and the ``length`` tokens that follow each.

    Neighbouring windows share one token (the last target of one is the first input of the next),
    so every token but the first is a target exactly once an epoch. A tail shorter than a window is
    left out of training; ``tail`` says how many tokens that is.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.count = (len(tokens) - 1) // length
        if self.count < 1:
            raise DataError(
                f"The training split has {len(tokens):,} tokens, less than one window of "
                f"{length + 1:,}. Use more text, or a shorter window:\n"
                f"  training.sequence_length={max(len(tokens) // 4, 1)}"
            )
        self.tail = len(tokens) - 1 - self.count * length

    def order(self, start: int, count: int) -> np.ndarray:
        """Window numbers at places ``start .. start + count`` of the endless sequence of epochs."""
        place = np.arange(start, start + count)
        epoch, offset = place // self.count, place % self.count
        windows = np.empty(count, dtype=np.int64)
        for value in np.unique(epoch):
            chosen = epoch == value
            key = self.seed * 1_000_003 + int(value)
            windows[chosen] = permute(offset[chosen], self.count, key)
        return windows

    def batch(self, seen: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the ``size`` windows after the first ``seen``: [size, length]."""
        return self.rows(self.order(seen, size))

    def rows(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the windows of these numbers: [n, length] each."""
        starts = windows * self.length
        rows = self.tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)
        return rows[:, :-1], rows[:, 1:]
