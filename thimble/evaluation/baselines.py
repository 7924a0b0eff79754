"""What a model's bits per byte are to be held against, measured on the same held-out bytes.

n-gram models, counted on the training split with the model's own tokens, and the compressors
``zstd -19`` and ``xz -9``, of each document alone and of the whole text. All are in bits per byte
as defined in ``perplexity``. The n-gram models know the training text and the compressors do not;
a compressor of the whole text learns from that text while it codes it, which no model here does.
"""

from __future__ import annotations

import lzma
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from thimble import artifacts
from thimble.console import log, progress
from thimble.evaluation.perplexity import choose_documents
from thimble.tokens.shards import TokenSplit
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
TRAIN_TOKENS = 30_000_000
ORDERS = {1: "unigram", 2: "bigram", 5: "5-gram"}
CHUNK = 64  # documents decoded and compressed at a time


def known_rungs(directory: str | Path, split: str = "val") -> dict[str, float]:
    """Bits per byte of every baseline by name; see ``measure``."""
    return measure(directory, split)["rungs"]


def measure(
    directory: str | Path, split: str = "val", *, train_tokens: int = TRAIN_TOKENS
) -> dict[str, Any]:
    """Measure the baselines of a split of a tokens directory, or read what was measured before.

    The result is kept as ``baselines-<split>.json`` in the directory and is good as long as its
    tokens are the same. ``train_tokens`` bounds the training text the n-gram models count: whole
    documents, evenly chosen; time and memory grow with it.

    Returns ``rungs`` (name -> bits per byte), ``tokens``, ``bytes`` and ``documents`` they were
    measured on, ``train_tokens`` and ``train_tokens_available``, and ``notes`` (what was left out
    and why). Raises DataError when the directory is not whole.
    """
    held_out = TokenSplit(directory, split)
    path = held_out.directory / f"baselines-{split}.json"
    files = {name: held_out.manifest["files"][name] for name in ("train.bin", f"{split}.bin")}
    key = artifacts.fingerprint(
        [FORMAT, split, train_tokens, held_out.manifest["fingerprint"], files]
    )
    if path.is_file():
        kept = artifacts.read_json(path)
        if isinstance(kept, dict) and kept.get("key") == key:
            return kept
    stream, lengths, sizes, _ = choose_documents(held_out, None)
    train = TokenSplit(directory, "train")
    counted, *_ = choose_documents(train, train_tokens)
    notes = []
    if len(counted) < len(train):
        notes.append(f"The n-gram models count {len(counted):,} of {len(train):,} training tokens.")
    bits = _ngram_bits(counted, stream, held_out)
    tokenizer = load_tokenizer(held_out.directory)
    found = _compressed_bits(stream, lengths, sizes, tokenizer)
    if found is None:
        notes.append(
            "This tokenizer does not give back the text byte for byte, so there is no held-out "
            "text here for zstd and xz to compress."
        )
    size = int(sizes.sum())
    result = {
        "key": key,
        "split": split,
        "tokens": len(stream),
        "bytes": size,
        "documents": len(lengths),
        "train_tokens": len(counted),
        "train_tokens_available": len(train),
        "rungs": {name: value / size for name, value in {**bits, **(found or {})}.items()},
        "notes": notes,
        "versions": artifacts.versions("numpy", "zstandard"),
    }
    try:
        artifacts.write_json(path, result)
    except OSError as error:  # tokens may be shared and read-only; then it is measured each time
        log.warning("The baselines could not be kept: %s", error)
    return result


def _ngram_bits(counted: np.ndarray, stream: np.ndarray, split: TokenSplit) -> dict[str, float]:
    from thimble.evaluation.ngrams import NgramModel

    highest = max(ORDERS)
    with progress("baselines: n-grams", highest * len(counted), "tokens") as advance:
        model = NgramModel(counted, highest, split.vocab_size, advance)
        bits = model.bits(stream, split.eot_id, tuple(ORDERS))
    named = {ORDERS[order]: value for order, value in bits.items()}
    return {"uniform": len(stream) * float(np.log2(split.vocab_size)), **named}


def _compressed_bits(
    stream: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, tokenizer: Tokenizer
) -> dict[str, float] | None:
    """Bits of the compressed documents; None when decoding does not give their bytes again."""
    ends = np.cumsum(lengths)

    def texts(first: int) -> list[bytes]:
        last = min(first + CHUNK, len(lengths))
        return [  # without the end-of-text token
            tokenizer.decode(stream[ends[i] - lengths[i] : ends[i] - 1].tolist()).encode()
            for i in range(first, last)
        ]

    whole: list[bytes] = []
    alone = {"zstd -19, each document": 0.0, "xz -9, each document": 0.0}
    total = float(sizes.sum())
    with (
        progress("baselines: compressors", 4 * total, "bytes") as advance,
        ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool,
    ):

        def compress_each(first: int) -> tuple[list[bytes], int, int]:
            chunk = texts(first)
            return chunk, sum(map(zstd_size, chunk)), sum(map(xz_size, chunk))

        for chunk, zstd_bytes, xz_bytes in pool.map(compress_each, range(0, len(lengths), CHUNK)):
            expected = sizes[len(whole) : len(whole) + len(chunk)]
            if [len(text) for text in chunk] != expected.tolist():
                pool.shutdown(cancel_futures=True)
                return None
            whole += chunk
            alone["zstd -19, each document"] += 8 * zstd_bytes
            alone["xz -9, each document"] += 8 * xz_bytes
            advance(2 * sum(map(len, chunk)))
        text = b"".join(whole)

        def compress_whole(compressor: Callable[[bytes], int]) -> float:
            bits = 8.0 * compressor(text)
            advance(total)
            return bits

        zstd_bits, xz_bits = pool.map(compress_whole, (zstd_size, xz_size))
    return {**alone, "zstd -19, whole text": zstd_bits, "xz -9, whole text": xz_bits}


def zstd_size(text: bytes) -> int:
    """Bytes of ``zstd -19 FILE``, its checksum included."""
    compressor = zstandard.ZstdCompressor(level=19, write_checksum=True, write_content_size=True)
    return len(compressor.compress(text))


def xz_size(text: bytes) -> int:
    """Bytes of ``xz -9``. A dictionary as long as the text finds the same matches as that
    preset's 64 MiB, which take 40 ms to set up for every document."""
    preset = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(max(len(text), 4096), 2**26)}
    return len(lzma.compress(text, filters=[preset]))
