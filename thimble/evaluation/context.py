"""How fast a model reads and writes, and what it has to keep, against what it has read.

Attention keeps keys and values of every position and looks at all of them for each new one;
retention keeps one matrix a head, however long the text.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from thimble.console import progress
from thimble.evaluation.reading import Reader, greedily, prompt
from thimble.training import devices

NEW_TOKENS = 32
ENOUGH = 1.0  # seconds of reading, after which it is not repeated
REPEATS = 3


@torch.inference_mode()
def measure(
    models: Mapping[str, Reader], vocabulary: int, lengths: Sequence[int]
) -> dict[str, Any]:
    """Of each model and length, one sequence at a time, as JSON.

    ``prefill_tokens_per_second``: reading the context; ``decode_tokens_per_second``: of one token
    at a time after it, by the median of ``NEW_TOKENS``; ``state_bytes``: what is kept for the
    context, counted from its tensors; ``peak_bytes``: of the device while reading and writing,
    weights included, None where nobody counts it; ``beyond``: longer than the model was made for,
    which makes what it says worthless and its costs no other. ``too_long``: lengths it cannot read.
    """
    found: dict[str, Any] = {}
    reading = [n for reader in models.values() for n in lengths if n + NEW_TOKENS <= reader.most]
    ids = np.random.default_rng(0).integers(0, vocabulary, max(lengths))
    with progress("context", sum(reading), "tokens") as advance:
        for name, reader in models.items():
            rows, too_long = [], []
            for length in lengths:
                if length + NEW_TOKENS > reader.most:
                    too_long.append(length)
                    continue
                if not rows:
                    _once(reader, ids[:length])  # warms up
                rows.append({"length": length, **_of_length(reader, ids[:length])})
                advance(length)
            found[name] = {"rows": rows, "made_for": reader.made_for, "too_long": too_long}
    device = next(iter(models.values())).device
    return {
        "lengths": list(lengths),
        "new_tokens": NEW_TOKENS,
        "device": devices.describe(device),
        "models": found,
    }


def _of_length(reader: Reader, ids: np.ndarray) -> dict[str, Any]:
    cuda = reader.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(reader.device)
    took: list[float] = []
    tokens: list[float] = []
    while len(took) < REPEATS and sum(took) < ENOUGH:
        read, each, kept = _once(reader, ids)
        took.append(read)
        tokens += each
    return {
        "prefill_tokens_per_second": len(ids) / statistics.median(took),
        "decode_tokens_per_second": 1 / statistics.median(tokens),
        "state_bytes": kept,
        "peak_bytes": torch.cuda.max_memory_allocated(reader.device) if cuda else None,
        "beyond": reader.made_for is not None and len(ids) > reader.made_for,
    }


def _once(reader: Reader, ids: np.ndarray) -> tuple[float, list[float], int]:
    """Seconds of reading and of each new token, and the bytes kept after reading."""
    context = torch.from_numpy(ids)[None].to(reader.device)
    started = time.perf_counter()
    state = reader.begin(1, len(ids) + NEW_TOKENS)
    logits = prompt(reader, context, state)
    logits.argmax().item()  # brought to the host: it has been computed
    times = [time.perf_counter()]
    kept = reader.state_bytes(state)
    for chosen in greedily(reader, logits, state, NEW_TOKENS):
        chosen.item()
        times.append(time.perf_counter())
    # The first was known after reading.
    return times[0] - started, list(np.diff(times[1:])), kept
