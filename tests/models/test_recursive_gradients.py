"""Recursive models learn as the papers write it, and read on from a cache."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.models.test_recursive import (
    CAUSAL,
    MLP,
    PUZZLE,
    SEPARATE,
    SINGLE,
    ids_of,
    model_of,
    small,
)
from thimble.errors import ConfigError
from thimble.generation.sampling import generate_ids
from thimble.models.recursive import RecursiveLM

# --- gradients


def as_the_papers_write_it(
    model: RecursiveLM, z: tuple[torch.Tensor, ...], x: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """One supervision step, without cleverness. TRM: T-1 cycles without gradients, one with (here:
    the last n of T). HRM: everything without, then one call of each."""
    config, rope = model.config, model.rope_2sc[:, : x.shape[1]]

    def net(stack: Any, h: torch.Tensor) -> torch.Tensor:
        for block in stack.blocks:
            mixed, _ = block.mixer(h, rope, None)
            h = h + mixed
            h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            h = h + block.mlp(h)
            h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return h

    low, high = model.stacks[0], model.stacks[-1]
    if config.single_z:
        (y,) = z
        learned = max(config.bp_cycles * config.L_cycles, 1)
        with torch.no_grad():
            for _ in range(config.H_cycles * config.L_cycles - learned):
                y = net(low, y + x)
        for _ in range(learned):
            y = net(low, y + x)
        return (y,)
    y, r = z

    def cycle(y: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(config.L_cycles):
            r = net(low, r + y + x)
        return net(high, y + r), r

    if config.bp_cycles == 0:
        with torch.no_grad():
            for _ in range(config.H_cycles - 1):
                y, r = cycle(y, r)
            for _ in range(config.L_cycles - 1):
                r = net(low, r + y + x)
        r = net(low, r + y + x)
        y = net(high, y + r)
        return y, r
    with torch.no_grad():
        for _ in range(config.H_cycles - config.bp_cycles):
            y, r = cycle(y, r)
    for _ in range(config.bp_cycles):
        y, r = cycle(y, r)
    return y, r


@pytest.mark.parametrize("bp_cycles", [0, 1, 2, 3])
@pytest.mark.parametrize("changes", [{}, SEPARATE, SINGLE, PUZZLE, MLP])
def test_equals_the_recursion_as_the_papers_write_it(
    changes: dict[str, Any], bp_cycles: int
) -> None:
    config = small(**changes, bp_cycles=bp_cycles)
    model = model_of(config).double()
    model.compute_dtype = torch.float64
    ids = ids_of()
    draw = torch.Generator().manual_seed(3)
    start = tuple(
        torch.randn(2, 20, 24, generator=draw, dtype=torch.float64)
        for _ in model.initial_latents(2, 20)
    )
    target = torch.randn(2, 20, 24, generator=draw, dtype=torch.float64)
    results = []
    for step in (model.supervision_step, lambda z, x: as_the_papers_write_it(model, z, x)):
        model.zero_grad()
        z = step(start, model.embed(ids))
        (z[0] * target).sum().backward()
        results.append((z, {name: p.grad for name, p in model.named_parameters()}))
    (mine, gradients), (theirs, expected) = results
    torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)
    for name, gradient in gradients.items():
        if expected[name] is None:
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-6)
    assert any(gradient is not None for gradient in gradients.values())


def test_more_cycles_in_the_gradient_are_another_gradient() -> None:
    seen = []
    for bp_cycles in (0, 1, 2, 3):
        model = model_of(small(bp_cycles=bp_cycles))
        model(ids_of()).square().mean().backward()
        seen.append(model.stacks[0].get_parameter("blocks.0.mlp.down.weight").grad)
    for one, other in itertools.combinations(seen, 2):
        assert not torch.allclose(one, other, rtol=1e-3)


def test_supervision_steps_pass_no_gradient_on() -> None:
    model = model_of(small(bp_cycles=3))
    *_, before, last = model.unroll(ids_of(), steps=3)
    assert before[0].requires_grad
    grads = torch.autograd.grad(last[0].sum(), before, allow_unused=True)
    assert grads == (None, None)


def test_activations_computed_again_give_the_same_gradient() -> None:
    gradients = []
    for again in (False, True):
        model = model_of(small(bp_cycles=2))
        model.checkpoint_activations = again
        assert model.checkpoint_activations is again
        model(ids_of()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


def test_bfloat16_stays_near_float32() -> None:
    model = model_of(small(halt_max_steps=1, H_cycles=1))
    exact = model(ids_of())
    model.compute_dtype = torch.bfloat16
    near = model(ids_of())
    assert near.dtype is torch.float32
    assert (near - exact).abs().max() < 0.1 * exact.abs().max()
    assert not torch.equal(near, exact)


# --- caches


@torch.no_grad()
@pytest.mark.parametrize("changes", [*CAUSAL, {"num_key_value_heads": 4}])
@pytest.mark.parametrize("pieces", [[1] * 20, [9, 1, 4, 6], [20]])
def test_cached_equals_uncached(changes: dict[str, Any], pieces: list[int]) -> None:
    model = model_of(small(**changes))
    ids = ids_of()
    for steps in {1, model.config.halt_max_steps}:
        state = model.new_state(2, steps=steps)
        start, parts = 0, []
        for piece in pieces:
            parts.append(model(ids[:, start : start + piece], state))
            start += piece
        whole = model(ids, steps=steps)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_through_the_cache_is_the_greedy_one() -> None:
    model = model_of(small())
    prompt = ids_of(1, 5)[0].tolist()
    options = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 1}
    cached = list(generate_ids(model, prompt, max_tokens=15, **options))  # type: ignore[arg-type]
    ids = list(prompt)
    for _ in range(15):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert cached == ids[5:]
    assert len(set(cached)) > 3


def test_what_sees_the_future_has_no_cache() -> None:
    with pytest.raises(ConfigError, match="cache"):
        model_of(small(**PUZZLE)).new_state(1)
