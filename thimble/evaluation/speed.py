"""How fast a model answers: what a person waits for, and what comes after."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from thimble.console import progress
from thimble.generation.model import Model
from thimble.generation.sampling import generate_ids
from thimble.training import devices

REPEATS = 5
PROMPT_TOKENS, NEW_TOKENS = 32, 128


def measure(model: Model) -> dict[str, Any]:
    """Medians of five greedy generations, one sequence at a time, in float32 on the model's device.

    ``tokens_per_second`` of generating after the first token; ``first_token_ms``: reading a prompt
    of ``prompt_tokens`` and giving the first token; ``token_ms``: each later one;
    ``prompt_tokens_per_second``: reading a prompt that fills the context.
    """
    context = model.config.max_position_embeddings
    prompt = min(PROMPT_TOKENS, max(context // 4, 1))
    new = max(min(NEW_TOKENS, context - prompt), 2)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, model.tokenizer.vocab_size, context).tolist()
    first, later, reading = [], [], []
    with progress("speed", REPEATS + 1, "generations") as advance:
        for repeat in range(REPEATS + 1):
            times = [time.perf_counter()]
            for _ in generate_ids(
                model.network,
                ids[:prompt],
                max_tokens=new,
                temperature=0.0,
                top_k=0,
                top_p=1.0,
                seed=0,
            ):
                times.append(time.perf_counter())  # choosing a token has brought it to the host
            started = time.perf_counter()
            with torch.inference_mode():
                hidden = model.network.hidden(torch.tensor([ids], device=model.device))
                # The last position only, as in generating: all logits of a long context are GiBs.
                model.network.head(hidden[0, -1]).argmax().item()
            took = time.perf_counter() - started
            if repeat:  # the first one warms up
                first.append(times[1] - times[0])
                later.append((times[-1] - times[1]) / (len(times) - 2))
                reading.append(context / took)
            advance(1)
    token = statistics.median(later)
    return {
        "tokens_per_second": 1 / token,
        "first_token_ms": 1e3 * statistics.median(first),
        "token_ms": 1e3 * token,
        "prompt_tokens_per_second": statistics.median(reading),
        "prompt_tokens": prompt,
        "new_tokens": new,
        "device": devices.describe(model.device),
    }
