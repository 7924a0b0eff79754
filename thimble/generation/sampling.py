"""Sampling: from logits to the next token, one token at a time over the layers' states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from thimble.errors import ConfigError
from thimble.models.causal_lm import CausalLM


def check_options(temperature: float, top_k: int, top_p: float, max_tokens: int) -> None:
    if temperature < 0:
        raise ConfigError(f"--temperature {temperature} is negative; 0 takes the likeliest token.")
    if top_k < 0:
        raise ConfigError(f"--top-k {top_k} is negative; 0 draws from all tokens.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p} is not above 0 and at most 1; 1 draws from all tokens.")
    if max_tokens < 1:
        raise ConfigError(f"--max-tokens {max_tokens} leaves nothing to generate.")


def choose(
    logits_v: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token id from logits [V]. Temperature 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off.

    top-p keeps the smallest set of likeliest tokens whose probability reaches ``top_p``
    (arXiv:1904.09751), after temperature and top-k, the order transformers uses.
    """
    if temperature == 0:
        return int(logits_v.argmax())
    logits = logits_v.float() / temperature
    if 0 < top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= top_p
        probabilities = probabilities.scatter(0, index[beyond], 0.0)
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))


@torch.inference_mode()
def generate_ids(
    model: CausalLM,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield up to ``max_tokens`` ids that follow ``prompt``, ending before an id in ``stop``.

    When the context is full its older half is forgotten and the rest read again, so generation can
    go on beyond the context at the price of that memory. Retention has no end to its context.
    """
    generator = torch.Generator().manual_seed(seed)
    context = model.config.max_position_embeddings
    device = model.embedding.weight.device
    ids = list(prompt)
    feed = ids if model.config.mixer == "retention" else ids[-context:]
    state = model.new_state(1, min(context, len(feed) + max_tokens))
    for _ in range(max_tokens):
        if state[0].length + len(feed) > state[0].capacity:
            feed = ids[-(context // 2) :]
            state = model.new_state(1, context)
        hidden = model.hidden(torch.tensor([feed], device=device), state)
        token = choose(model.head(hidden[0, -1]).float(), temperature, top_k, top_p, generator)
        if token in stop:
            return
        ids.append(token)
        feed = [token]
        yield token
