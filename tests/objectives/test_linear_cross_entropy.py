"""The chunked head and loss give what the naive form gives, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from thimble.objectives import linear_cross_entropy as module
from thimble.objectives.linear_cross_entropy import linear_cross_entropy, token_losses


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 67, 24, generator=draw, dtype=dtype, requires_grad=True)
    weight = (torch.randn(131, 24, generator=draw) * 0.3).requires_grad_()
    targets = torch.randint(0, 131, (3, 67), generator=draw)
    targets[0, :50] = -100
    targets[2, 66] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [64, 100, 10_000])
def test_equals_the_naive_form(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chunk_rows", lambda device, vocab_size: rows)
    hidden, weight, targets = problem(torch.float32)
    naive = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), targets.flatten(), reduction="sum")
    ours = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(ours, naive, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(ours / 7, [hidden, weight]),
        torch.autograd.grad(naive / 7, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_half_precision_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = problem(torch.float32)
    exact = linear_cross_entropy(hidden, weight, targets)
    exact_grad = torch.autograd.grad(exact, weight)[0]
    near = linear_cross_entropy(hidden.bfloat16(), weight, targets)
    near_grad = torch.autograd.grad(near, weight)[0]
    assert near_grad.dtype is torch.float32
    assert near.item() == pytest.approx(exact.item(), rel=1e-2)
    assert (near_grad - exact_grad).norm() < 0.02 * exact_grad.norm()


def test_nothing_to_predict_is_zero_not_nan() -> None:
    hidden, weight, targets = problem(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert loss.item() == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)


def test_token_losses_are_each_positions_share() -> None:
    hidden, weight, targets = problem(torch.float32)
    each = token_losses(hidden, weight, targets)
    assert each.shape == targets.shape
    assert torch.count_nonzero(each[targets == -100]) == 0
    torch.testing.assert_close(each.sum(), linear_cross_entropy(hidden, weight, targets))
