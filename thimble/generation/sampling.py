"""Sampling: from logits to the next token, one token at a time over the layers' states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from thimble.errors import ConfigError
from thimble.models.causal_lm import CausalLM, LayerState
from thimble.models.recursive import RecursiveLM

Network = CausalLM | RecursiveLM
# Of each token generated: the logits [V] it was chosen from, its id, and the supervision steps that
# were thought for it; None for a model whose stack runs once.
Watch = Callable[[Tensor, int, int | None], object]


def check_options(temperature: float, top_k: int, top_p: float, max_tokens: int) -> None:
    if temperature < 0:
        raise ConfigError(f"--temperature {temperature} is negative; 0 takes the likeliest token.")
    if top_k < 0:
        raise ConfigError(f"--top-k {top_k} is negative; 0 draws from all tokens.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p} is not above 0 and at most 1; 1 draws from all tokens.")
    if max_tokens < 1:
        raise ConfigError(f"--max-tokens {max_tokens} leaves nothing to generate.")


def log_weights(logits: Tensor, form: str) -> Tensor:
    """What to take the softmax of for the probabilities that ``form`` trained: float32 [..., V].

    Stablemax weighs a logit with 1 + v above 0 and 1 / (1 - v) below, whose logarithm is
    sign(v) log(1 + |v|); the order of the tokens is the same.
    """
    v = logits.float()
    return v.sign() * v.abs().log1p() if form == "stablemax" else v


def choose(
    logits_v: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    form: str = "softmax",
) -> int:
    """One token id from logits [V]. Temperature 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off.

    top-p keeps the smallest set of likeliest tokens whose probability reaches ``top_p``
    (arXiv:1904.09751), after temperature and top-k, the order transformers uses.
    """
    if temperature == 0:
        return int(logits_v.argmax())
    logits = log_weights(logits_v, form) / temperature
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
    model: Network,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: frozenset[int] = frozenset(),
    form: str = "softmax",
    steps: int | None = None,
    watch: Watch | None = None,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` ids that follow ``prompt``, ending before an id in ``stop``.

    When the context is full its older half is forgotten and the rest read again, so generation can
    go on beyond the context at the price of that memory. Retention has no end to its context.

    ``form``: the cross-entropy that the model was trained with, softmax or stablemax. ``watch`` is
    called with each token, also with the one that stops.

    A recursive model thinks the same number of ``steps`` about every token; by default as many as
    its halting head asks for at the end of the prompt. Given that number the states are exact. What
    is approximated is the number itself: each further token might have asked for another one.
    """
    generator = torch.Generator().manual_seed(seed)
    context = model.config.max_position_embeddings
    device = model.embedding.weight.device
    ids = list(prompt)
    feed = ids if model.config.mixer == "retention" else ids[-context:]
    capacity = min(context, len(feed) + max_tokens)
    state: Sequence[LayerState] = []
    for _ in range(max_tokens):
        if state and state[0].length + len(feed) > state[0].capacity:
            feed, capacity, state = ids[-(context // 2) :], context, []
        fed = torch.tensor([feed], device=device)
        if state:
            hidden = model.hidden(fed, state)
        else:
            hidden, state, steps = read(model, fed, capacity, steps)
        # Of all positions only the last one reaches the head.
        logits = model.head(hidden[0, -1]).float()
        token = choose(logits, temperature, top_k, top_p, generator, form)
        if watch:
            watch(logits, token, steps)
        if token in stop:
            return
        ids.append(token)
        feed = [token]
        yield token


def read(
    model: Network, ids_1t: Tensor, capacity: int, steps: int | None = None
) -> tuple[Tensor, Sequence[LayerState], int | None]:
    """Read a prompt [1, T]: its hidden states [1, T, D], its states, the supervision steps taken.

    Without ``steps`` those are as many as the halting head asks for at the prompt's last position,
    which has seen all of it: where it was asked in training (of several turns at the first answer
    alone). None for a stack that runs once.
    """
    if not isinstance(model, RecursiveLM):
        state: Sequence[LayerState] = model.new_state(1, capacity)
        return model.hidden(ids_1t, state), state, None
    state = model.new_state(1, capacity, steps=steps)
    last = torch.tensor([ids_1t.shape[1] - 1], device=ids_1t.device)
    for taken, z in enumerate(model.unroll(ids_1t, state), start=1):
        if steps is None and bool(model.halting_logit(model.q_values(z, last)) > 0):
            steps = taken
            break
    steps = steps or model.config.halt_max_steps
    return model.tokens(z), state[: steps * model.config.blocks_per_step], steps
