"""Packed chunks as text: what of documents is in them, as a ``TokenSplit`` would have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from thimble.tokens.packed import IGNORED, PackedChunks
from thimble.tokens.packing import beginning

if TYPE_CHECKING:
    from thimble.tokens.tokenizer import Tokenizer

AT_ONCE = 64


class PackedText:
    """The documents, or parts of some, in evenly chosen chunks with ``most`` tokens at most.

    ``tokens`` int64 [N], of each part with one end-of-text; ``documents`` has the columns of
    ``TokenSplit.documents`` that say where, with the bytes of the decoded text.
    """

    def __init__(self, chunks: PackedChunks, tokenizer: Tokenizer, most: int) -> None:
        import pyarrow

        self.directory, self.split, self.manifest = chunks.directory, chunks.split, chunks.manifest
        self.vocab_size, self.eot_id = chunks.vocab_size, chunks.eot_id
        count = max(1, min(len(chunks), most // chunks.length))
        numbers = np.linspace(0, len(chunks) - 1, count).round().astype(np.int64)
        own = [*beginning(tokenizer), self.eot_id]
        parts: list[np.ndarray] = []
        sizes: list[int] = []
        for first in range(0, count, AT_ONCE):
            batch = chunks.rows(numbers[first : first + AT_ONCE])
            for ids, labels, starts in zip(batch.inputs, batch.labels, batch.starts, strict=True):
                end = int(np.flatnonzero(labels != IGNORED).max(initial=-1)) + 1
                for part in np.split(ids[:end], np.flatnonzero(starts[1:end]) + 1):
                    words = part[~np.isin(part, own)]
                    if len(words):
                        parts.append(np.append(words, self.eot_id))
                        sizes.append(len(tokenizer.decode(words.tolist()).encode()))
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        self.tokens = np.concatenate([np.zeros(0, np.int64), *parts])
        self.documents: Any = pyarrow.table(
            {
                "start": np.cumsum(lengths) - lengths,
                "tokens": lengths,
                "bytes": np.array(sizes, dtype=np.int64),
                "category": ["text"] * len(parts),
            }
        )

    def __len__(self) -> int:
        return len(self.tokens)
