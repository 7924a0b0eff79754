"""Tokenized conversations on disk: flat ids and labels, and a table of the examples in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from thimble import artifacts
from thimble.conversations.template import Template, template_of
from thimble.errors import DataError
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer

KIND = "conversations"
MAKE = "thimble conversations build NAME_OR_PATH"
SPLITS = ("train", "test", "val")
IGNORED = -100  # the label of a position that is not trained on

EXAMPLE = np.dtype(
    [
        ("start", "<i8"),  # of its tokens in ids and labels
        ("length", "<i4"),  # in tokens, the end of the last answer included
        ("prompt", "<i4"),  # tokens before the first answer
        ("labelled", "<i4"),  # tokens that are a model's own to say
        ("weight", "<f4"),  # in the loss
        ("split", "u1"),  # place in SPLITS
        ("file", "<u2"),  # place in the manifest's list of files
        ("line", "<i8"),  # line or row there, from 1
        ("group", "<u8"),  # hash of what must not be divided
        ("text", "<u8"),  # hash of the first question, up to case and whitespace
    ]
)


class Conversations:
    """A directory made by ``thimble conversations build``, opened read-only and checked.

    ``ids`` [number of tokens] and ``labels`` (1: a token that the model is to say) of the same
    shape, ``examples`` [number of examples] of dtype ``EXAMPLE``; all are memory maps. Raises
    DataError when the directory is missing, its files do not have the sizes of the manifest, or an
    id is beyond the vocabulary.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = artifacts.read_manifest(self.directory, KIND, make=MAKE)
        problems = artifacts.damaged_files(self.directory, self.manifest, hashes=False)
        if problems:
            raise DataError(f"{self.directory} is damaged: {problems[0]}. Make it again:\n  {MAKE}")
        self.vocab_size: int = self.manifest["vocab_size"]
        self.pad_id: int = self.manifest["pad_id"]
        self.end_id: int = self.manifest["end_id"]  # with which an answer ends
        self.seq_len: int = self.manifest["options"]["seq_len"]
        self._open(np.dtype(self.manifest["dtype"]))

    def _open(self, dtype: np.dtype) -> None:
        self.ids: np.ndarray = np.memmap(self.directory / "ids.bin", dtype, mode="r")
        self.labels: np.ndarray = np.memmap(self.directory / "labels.bin", np.uint8, mode="r")
        self.examples: np.ndarray = np.memmap(self.directory / "examples.bin", EXAMPLE, mode="r")
        ends = self.examples["start"] + self.examples["length"]
        if len(self.ids) != len(self.labels) or int(ends[-1]) != len(self.ids):
            raise DataError(f"The files of {self.directory} do not belong together. Make it again.")
        step = 1 << 24
        for begin in range(0, len(self.ids), step):
            if int(self.ids[begin : begin + step].max()) >= self.vocab_size:  # would crash a GPU
                raise DataError(
                    f"{self.directory} has ids beyond its vocabulary of {self.vocab_size:,} "
                    f"entries, so it is damaged. Make it again:\n  {MAKE}"
                )

    def __len__(self) -> int:
        return len(self.examples)

    def split(self, name: str) -> np.ndarray:
        """Numbers of the examples in ``train``, ``test`` or ``val``, int64."""
        if name not in SPLITS:
            raise DataError(f"There is no split {name!r}; there are {', '.join(SPLITS)}.")
        return np.flatnonzero(self.examples["split"] == SPLITS.index(name))

    def example(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels (bool) of one example, each [its length]."""
        start, length = self.examples[number]["start"], self.examples[number]["length"]
        return self.ids[start : start + length], self.labels[start : start + length].astype(bool)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory)

    def template(self) -> Template:
        """The template they were laid out with, for ``prompt_ids``."""
        options = self.manifest["options"]
        return template_of(options["template"], self.tokenizer(), options["system_message"])

    @property
    def counts(self) -> dict[str, Any]:
        return self.manifest["counts"]

    @property
    def checks(self) -> dict[str, Any]:
        return self.manifest["checks"]


class Unsealed(Conversations):
    """The same before it has a manifest, for measuring what was just written."""

    def __init__(self, directory: Path, dtype: np.dtype, vocab_size: int, pad_id: int) -> None:
        self.directory, self.vocab_size, self.pad_id = directory, vocab_size, pad_id
        self._open(dtype)
