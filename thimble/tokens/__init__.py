"""Documents become token ids: tokenizers, train/val/test shards and their statistics."""

from __future__ import annotations

from pathlib import Path


def build(
    corpus: str | Path,
    *,
    output: str | Path | None = None,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    workers: int | None = None,
) -> Path:
    """Tokenize a corpus; see :func:`thimble.tokens.pipeline.build`."""
    from thimble.tokens import pipeline

    return pipeline.build(
        corpus, output=output, vocab_size=vocab_size, tokenizer=tokenizer, workers=workers
    )
