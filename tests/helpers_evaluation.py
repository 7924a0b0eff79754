"""Small splits in memory, as `TokenSplit` presents them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa

EOT = 0


def memory_split(
    documents: list[list[int]],
    *,
    categories: list[str] | None = None,
    sizes: list[int] | None = None,
    vocab_size: int = 16,
) -> SimpleNamespace:
    """Documents of ids (without end-of-text) as a split; a token counts as three bytes."""
    lengths = [len(document) + 1 for document in documents]
    table = pa.table(
        {
            "id": [f"d{i}" for i in range(len(documents))],
            "source": ["test"] * len(documents),
            "category": categories or ["text"] * len(documents),
            "start": np.cumsum([0, *lengths])[:-1].astype(np.int64),
            "tokens": np.asarray(lengths, dtype=np.int64),
            "bytes": np.asarray(sizes or [3 * n for n in lengths], dtype=np.int64),
        }
    )
    tokens = np.asarray([i for d in documents for i in [*d, EOT]], dtype=np.uint16)
    return SimpleNamespace(tokens=tokens, documents=table, vocab_size=vocab_size, eot_id=EOT)
