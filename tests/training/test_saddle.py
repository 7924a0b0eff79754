"""Saddles are found whatever the scale, left by interventions, and remembered over a resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from thimble.config.schema import SaddleConfig
from thimble.training.saddle import BOOSTS, SaddleWatch

EVERY = 10


def stuck_run(scale: float = 1.0, offset: float = 0.0) -> list[tuple[int, float, float]]:
    """A fall, 500 steps on a plateau with a small gradient, and another fall."""
    series = []
    for step in range(EVERY, 1500, EVERY):
        if step < 300:
            loss, norm = 5 - 3 * step / 300, 2.0
        elif step < 800:
            loss, norm = 2 - 1e-5 * (step - 300), 0.1
        else:
            loss, norm = 2 - 1.5 * (step - 800) / 700, 1.5
        series.append((step, scale * loss + offset, scale * norm))
    return series


def events(watch: SaddleWatch, series: list[tuple[int, float, float]]) -> list[dict[str, Any]]:
    found = [watch.observe(*entry) for entry in series]
    return [event for event in found if event]


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (100, 0), (0.01, 0), (1, 10)])
def test_a_plateau_is_found_at_every_scale(scale: float, offset: float) -> None:
    found = events(SaddleWatch(SaddleConfig(cooldown=1000)), stuck_run(scale, offset))
    assert [event["event"] for event in found] == ["saddle"]
    assert 300 + 150 <= found[0]["step"] <= 300 + 150 + 60
    assert found[0]["intervention"] is None


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda step: 8.0 * math.exp(-step / 400), id="falling"),
        pytest.param(lambda step: 3 + 5 * step**-0.5, id="a power law, as training is"),
        pytest.param(lambda step: 0.1 + 8 * math.exp(-step / 50), id="done"),
    ],
)
def test_no_saddle_where_there_is_none(loss: Any) -> None:
    series = [(step, loss(step), 0.5 if step > 300 else 2.0) for step in range(10, 600, 10)]
    assert not events(SaddleWatch(SaddleConfig()), series)


def test_a_rate_that_has_come_to_rest_is_no_saddle() -> None:
    rested = SaddleWatch(SaddleConfig())
    assert not any(rested.observe(*entry, rate=0.05) for entry in stuck_run())
    assert events(SaddleWatch(SaddleConfig()), stuck_run())


def test_a_steep_plateau_is_no_saddle() -> None:
    series = [(step, loss, 2.0) for step, loss, _ in stuck_run()]
    assert not events(SaddleWatch(SaddleConfig()), series)


def test_interventions_grow_and_their_number_ends() -> None:
    watch = SaddleWatch(SaddleConfig(interventions=True, cooldown=20, patience=50))
    flat = [(step, 5 - 3 * min(step, 200) / 200, 2.0 if step < 200 else 0.1)
            for step in range(EVERY, 4000, EVERY)]  # fmt: skip
    factors = []
    found = []
    for step, loss, norm in flat:
        event = watch.observe(step, loss, norm)
        found += [event] if event else []
        factors.append(watch.factor(step))
    changes = [event["intervention"] for event in found if event["event"] == "saddle"]
    assert [change["learning_rate"] for change in changes[:4]] == [rate for rate, _ in BOOSTS]
    assert changes[4:]
    assert not any(changes[4:])  # after the last it is only told
    assert max(factors) == 3.0
    assert factors[-1] == 1.0
    assert any(event["event"] == "saddle_stays" for event in found)


def test_it_goes_on_where_it_was() -> None:
    config = SaddleConfig(interventions=True)
    whole = events(SaddleWatch(config), stuck_run())
    first = SaddleWatch(config)
    before = events(first, stuck_run()[:50])
    after = events(SaddleWatch(config, first.to_dict()), stuck_run()[50:])
    assert before + after == whole
    assert len(whole) >= 2


def test_a_real_model_is_driven_onto_a_plateau_and_out_of_it() -> None:
    """A deep linear network near zero: its gradient is a product of small weights, so it rests at
    the origin's saddle, and leaves it the sooner the higher the rate."""

    def train(interventions: bool) -> tuple[list[str], int]:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(64, 4, generator=draw)
        target = x @ torch.randn(4, 4, generator=draw)
        layers = [torch.randn(4, 4, generator=draw) * 0.03 for _ in range(3)]
        bias = torch.full((4,), 3.0)  # learned at once: the fall before the plateau
        weights = [layer.requires_grad_() for layer in (*layers, bias)]
        options = {"patience": 60, "cooldown": 40, "interventions": interventions}
        watch, names, left = SaddleWatch(SaddleConfig(**options)), [], 4000
        for step in range(4000):
            y = x @ weights[0] @ weights[1] @ weights[2] + weights[3]
            loss = (y - target).square().mean()
            grads = torch.autograd.grad(loss, weights)
            norm = torch.stack([grad.norm() for grad in grads]).norm()
            with torch.no_grad():
                for weight, grad in zip(weights, grads, strict=True):
                    weight -= 0.05 * watch.factor(step) * grad
            if step % EVERY == EVERY - 1:
                event = watch.observe(step + 1, loss.item(), norm.item())
                names += [event["event"]] if event else []
            if loss < 1.0:
                left = step
                break
        return names, left

    quiet, alone = train(interventions=False)
    names, helped = train(interventions=True)
    assert "saddle" in quiet
    assert "saddle" in names
    assert helped < 0.8 * alone < 4000
