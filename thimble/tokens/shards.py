"""Token shards on disk: one flat file of ids a split, and a table of the documents in it."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thimble import artifacts
from thimble.errors import DataError

if TYPE_CHECKING:
    import pyarrow

    from thimble.tokens.tokenizer import Tokenizer

SPLITS = ("train", "val", "test")
MAKE = "thimble tokens build CORPUS"


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest of little-endian uint16 and uint32 that holds every id below ``vocab_size``."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class SplitWriter(contextlib.ExitStack):
    """Appends documents to ``<split>.bin`` and their table; memory does not grow with them."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype) -> None:
        import pyarrow
        import pyarrow.parquet

        super().__init__()
        self.dtype = dtype
        columns = dict.fromkeys(("id", "source", "category"), pyarrow.string())
        columns |= dict.fromkeys(("start", "tokens", "bytes"), pyarrow.int64())
        self.schema = pyarrow.schema(columns)
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}
        self.file = self.enter_context(open(directory / f"{split}.bin", "wb"))  # noqa: SIM115
        self.table = self.enter_context(
            pyarrow.parquet.ParquetWriter(
                directory / f"{split}.documents.parquet", self.schema, compression="zstd"
            )
        )

    def append(self, ids: np.ndarray, documents: dict[str, Any]) -> None:
        """``ids``: the documents' tokens one after the other, each with its end-of-text token.

        ``documents``: the table's columns without ``start``; ``tokens`` and ``bytes`` as arrays.
        """
        import pyarrow

        tokens = documents["tokens"]
        assert tokens.sum() == len(ids)
        start = self.counts["tokens"] + np.cumsum(tokens) - tokens
        self.file.write(ids.astype(self.dtype, copy=False).tobytes())
        self.table.write_table(pyarrow.table({**documents, "start": start}, schema=self.schema))
        self.counts["documents"] += len(tokens)
        self.counts["tokens"] += len(ids)
        self.counts["bytes"] += int(documents["bytes"].sum())


class TokenSplit:
    """One split of a tokens directory, opened read-only and checked.

    ``tokens`` is a memory map of shape [number of tokens]. Raises DataError when the directory is
    missing, or when file size, manifest and ids do not agree.
    """

    def __init__(self, directory: str | Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise DataError(f"There is no split {split!r}; there are {', '.join(SPLITS)}.")
        self.directory, self.split = Path(directory), split
        self.manifest = artifacts.read_manifest(self.directory, "tokens", make=MAKE)
        path = self.directory / f"{split}.bin"
        try:
            self.dtype = np.dtype(self.manifest["dtype"])
            self.vocab_size: int = self.manifest["vocab_size"]
            self.eot_id: int = self.manifest["eot_id"]
            expected = self.manifest["counts"][split]["tokens"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.directory / artifacts.MANIFEST} does not say {error}. Make the tokens "
                f"again with:\n  {MAKE}"
            ) from error
        if not path.is_file():
            raise DataError(f"{path} is missing. Make it again with:\n  {MAKE}")
        size = path.stat().st_size
        if size != expected * self.dtype.itemsize:
            raise DataError(
                f"{path} has {size:,} bytes, but its manifest says {expected:,} tokens of "
                f"{self.dtype.itemsize} bytes each ({expected * self.dtype.itemsize:,}). It was "
                f"cut off or changed; make it again with:\n  {MAKE}"
            )
        self.tokens: np.memmap = np.memmap(path, dtype=self.dtype, mode="r", shape=(expected,))
        self._check_ids(path)

    def _check_ids(self, path: Path) -> None:
        """An id beyond the vocabulary would crash a GPU kernel, or read a stranger's row."""
        if self.vocab_size > np.iinfo(self.dtype).max:
            return
        step = 1 << 24
        for begin in range(0, len(self.tokens), step):
            block = self.tokens[begin : begin + step]
            if int(block.max()) >= self.vocab_size:
                at = begin + int(np.argmax(block >= self.vocab_size))
                raise DataError(
                    f"{path} has id {int(self.tokens[at])} at token {at:,}, but its vocabulary has "
                    f"{self.vocab_size:,} entries. The file is damaged or belongs to another "
                    f"tokenizer; make it again with:\n  {MAKE}"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def documents(self) -> pyarrow.Table:
        """Columns ``id, source, category, start, tokens, bytes``, in the order of the tokens."""
        import pyarrow.parquet

        path = self.directory / f"{self.split}.documents.parquet"
        try:
            return pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}. Make it again.") from error


def check_tokenizer(manifest: dict[str, Any], tokenizer: Tokenizer, where: object) -> None:
    """Raise DataError unless ``tokenizer`` is the one the shards of ``manifest`` were made with."""
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise DataError(
            f"The tokenizer of {where} ({tokenizer.vocab_size:,} entries) is not the one these "
            f"tokens were made with ({manifest['vocab_size']:,} entries), so their ids mean other "
            f"text. Tokenize the corpus again with:\n  {MAKE} --tokenizer {where}"
        )


def corpus_of(directory: str | Path, manifest: dict[str, Any]) -> Path | None:
    """The corpus that tokens were made from, where it still is: ``data/corpus`` or beside them."""
    made_from = manifest["inputs"].get("corpus") or {}
    name = made_from.get("name")
    for home in (Path("data/corpus"), Path(directory).resolve().parents[1] / "corpus"):
        if name and (home / name / artifacts.MANIFEST).is_file():
            found = artifacts.read_json(home / name / artifacts.MANIFEST)
            if found.get("fingerprint") == made_from.get("fingerprint"):
                return home / name
    return None
