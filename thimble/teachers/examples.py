"""The rows of tokens a teacher is asked about, by number: the place a cache is addressed by."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from thimble import artifacts
from thimble.errors import ConfigError
from thimble.tokens import packing
from thimble.tokens.loader import Windows
from thimble.tokens.packed import PackedChunks
from thimble.tokens.shards import TokenSplit
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer


class Rows(NamedTuple):
    """B rows of L tokens. Nobody shifts ``targets`` again: they are what follows each input."""

    inputs: np.ndarray  # [B, L] int64
    targets: np.ndarray  # [B, L] int64, -100 where there is nothing to learn
    starts: np.ndarray | None  # [B, L] bool, where a document begins that sees none before it


class Examples(Protocol):
    """A data set as ``count`` numbered rows of ``length`` tokens below ``vocab_size``."""

    directory: Path
    length: int
    vocab_size: int

    @property
    def count(self) -> int: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers are numbers of, as JSON: equal ones have the same row at each number."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def rows(self, numbers: Sequence[int] | np.ndarray) -> Rows: ...


def open_examples(directory: str | Path, split: str, length: int | None) -> Examples:
    """The rows of a data folder: packed chunks, or windows of ``length`` of a tokens folder.

    Raises ConfigError where a length is needed and not given, DataError where it is not that of
    the chunks, or where the folder is neither.
    """
    if artifacts.kind(directory) == packing.KIND:
        return PackedExamples(directory, split, length)
    if length is None:
        raise ConfigError(
            f"How long are the rows that the student reads of {directory}? Say what its recipe "
            "says as training.sequence_length:\n  --sequence-length N"
        )
    if length < 1:
        raise ConfigError(f"Rows of {length} tokens: give at least 1.")
    return WindowExamples(directory, split, length)


class PackedExamples:
    """The chunks of a split (None: of both) of a packed folder, as ``tokens.packed.PackedChunks``
    numbers them.

    Raises DataError when the split is missing or damaged, and for another ``length``.
    """

    def __init__(self, directory: str | Path, split: str | None, length: int | None = None) -> None:
        self.directory, self.split = Path(directory), split
        self.chunks = PackedChunks(directory, split, length=length)
        self.count, self.length = self.chunks.count, self.chunks.length
        self.vocab_size = self.chunks.vocab_size

    @property
    def identity(self) -> dict[str, Any]:
        files = self.chunks.manifest["files"]
        return {
            "chunks": self.chunks.manifest["fingerprint"],
            "sha256": artifacts.fingerprint([files[n]["sha256"] for n in self.chunks.names]),
            "split": self.split,
            "length": self.length,
        }

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory)

    def rows(self, numbers: Sequence[int] | np.ndarray) -> Rows:
        batch = self.chunks.rows(np.asarray(numbers, dtype=np.int64))
        return Rows(batch.inputs, batch.targets, batch.starts)


class WindowExamples:
    """The windows of a split of a tokens folder, as ``tokens.loader.Windows`` numbers them.

    Raises DataError when the split is missing, damaged, or has less than one window.
    """

    def __init__(self, directory: str | Path, split: str, length: int) -> None:
        self.directory, self.split = Path(directory), TokenSplit(directory, split)
        self.windows = Windows(self.split.tokens, length, seed=0)
        self.count, self.length = self.windows.count, length
        self.vocab_size = self.split.vocab_size

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "tokens": self.split.manifest["fingerprint"],
            "sha256": self.split.manifest["files"][f"{self.split.split}.bin"]["sha256"],
            "split": self.split.split,
            "length": self.length,
        }

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory)

    def rows(self, numbers: Sequence[int] | np.ndarray) -> Rows:
        return Rows(*self.windows.rows(np.asarray(numbers, dtype=np.int64)), None)
