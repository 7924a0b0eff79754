"""The averages of the weights, Adam-atan2 and sign descent, each against its definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import helpers_training as helpers
from thimble.config.schema import OptimConfig
from thimble.training.ema import EMA
from thimble.training.optimizer import AdamAtan2, make_optimizer
from thimble.training.sparse_sign import SparseSignSGD, everywhere


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 4, sparse=True)
        self.up = nn.Linear(4, 5)
        self.register_buffer("fixed", torch.ones(3))


def gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.up.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * size


# --- EMA


def test_the_average_is_the_sum_it_stands_for() -> None:
    model, decay = Small(), 0.9
    average = EMA(model.up.named_parameters(), decay)
    history = [model.up.weight.detach().clone()]
    for step in range(6):
        with torch.no_grad():
            model.up.weight.add_(torch.randn(5, 4, generator=torch.Generator().manual_seed(step)))
        average.update()
        history.append(model.up.weight.detach().clone())
    shares = [decay**6, *((1 - decay) * decay ** (5 - n) for n in range(6))]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(shares, history, strict=True))
    torch.testing.assert_close(average.state_dict()["weight"], expected)


def test_the_model_has_the_averages_for_a_while_and_then_its_own() -> None:
    model = Small()
    average = EMA(model.named_parameters(), 0.5)
    first = model.up.weight.detach().clone()
    with torch.no_grad():
        model.up.weight.mul_(3)
    average.update()
    trained = model.up.weight.detach().clone()

    def look() -> None:
        with average.applied():
            torch.testing.assert_close(model.up.weight.detach(), first * 2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        look()
    assert torch.equal(model.up.weight, trained)
    with average.applied():
        torch.testing.assert_close(model.up.weight.detach(), first * 2)


def test_averages_go_on_from_what_was_saved() -> None:
    model = Small()
    one = EMA(model.named_parameters(), 0.5)
    with torch.no_grad():
        model.up.weight.mul_(3)
    one.update()
    two = EMA(model.named_parameters(), 0.5)
    two.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    for average in (one, two):
        average.update()
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    with pytest.raises(KeyError, match="another model"):
        EMA(model.up.named_parameters(), 0.5).load_state_dict(one.state_dict())


def test_buffers_and_fixed_weights_are_not_averaged() -> None:
    model = Small()
    model.up.bias.requires_grad_(False)
    average = EMA(model.named_parameters(), 0.5)
    assert set(average.state_dict()) == {"table.weight", "up.weight"}


# --- Adam-atan2


def test_adam_atan2_equals_its_definition() -> None:
    rate, (beta1, beta2), decay = 0.01, (0.9, 0.95), 0.1
    model, reference = Small(), Small()
    mine = make_optimizer(
        model, OptimConfig(name="adam_atan2", learning_rate=rate, weight_decay=decay)
    )
    assert isinstance(mine, AdamAtan2)
    moments = {name: (0.0, 0.0) for name, _ in reference.up.named_parameters()}
    for step in range(1, 8):
        gradients(model, step, size=10.0 ** (-3 * step))
        mine.step()
        for name, weight in reference.up.named_parameters():
            grad = dict(model.up.named_parameters())[name].grad
            assert grad is not None
            m, v = moments[name]
            moments[name] = m, v = (
                beta1 * m + (1 - beta1) * grad.double(),
                beta2 * v + (1 - beta2) * grad.double() ** 2,
            )
            update = torch.atan2(m / (1 - beta1**step), (v / (1 - beta2**step)).sqrt())
            shrink = 1 - rate * (decay if weight.dim() > 1 else 0)
            weight.data = (weight.data.double() * shrink - rate * update).float()
    for name, weight in reference.up.named_parameters():
        mine_now = dict(model.up.named_parameters())[name]
        torch.testing.assert_close(mine_now, weight, rtol=1e-6, atol=1e-6)


def test_adam_atan2_does_not_see_the_size_of_the_gradient() -> None:
    moved = []
    for size in (1.0, 1e-12):
        model = Small()
        before = model.up.weight.detach().clone()
        optimizer = AdamAtan2(model.up.parameters(), lr=0.1, weight_decay=0.0)
        for seed in range(3):
            gradients(model, seed, size)
            optimizer.step()
        moved.append(model.up.weight.detach() - before)
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-6)
    assert moved[0].abs().max() <= 3 * 0.1 * math.pi / 2


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_the_guard_refuses_changes_nothing(first: bool) -> None:
    model, untouched = Small(), Small()
    optimizers = [AdamAtan2(each.up.parameters(), lr=0.1) for each in (model, untouched)]
    if not first:
        for each, optimizer in zip((model, untouched), optimizers, strict=True):
            gradients(each, 0)
            optimizer.step()
    before = model.up.weight.detach().clone()
    gradients(model, 1)
    model.up.weight.grad[0, 0] = float("nan")  # type: ignore[index]
    optimizers[0].found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizers[0].step()
    assert torch.equal(model.up.weight, before)
    optimizers[0].found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    for each, optimizer in zip((model, untouched), optimizers, strict=True):
        gradients(each, 2)
        optimizer.step()
    torch.testing.assert_close(model.up.weight, untouched.up.weight, rtol=0, atol=1e-7)


def test_adam_atan2_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    models = [Small(), Small()]
    one, two = (AdamAtan2(each.up.parameters(), lr=0.1) for each in models)
    for seed in range(3):
        gradients(models[0], seed)
        one.step()
    models[1].load_state_dict(models[0].state_dict())
    torch.save(one.state_dict(), tmp_path / "optimizer.pt")
    two.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for each, optimizer in zip(models, (one, two), strict=True):
        gradients(each, 9)
        optimizer.step()
    assert torch.equal(models[0].up.weight, models[1].up.weight)


def test_a_run_trains_with_adam_atan2(tmp_path: Path) -> None:
    trainer = helpers.trainer(helpers.config(tmp_path, "optim.name=adam_atan2"))
    for _ in range(12):
        trainer.step()
    assert isinstance(trainer.optimizer, AdamAtan2)
    mean = trainer.loss_sum.item() / 12
    trainer.loss_sum.zero_()
    trainer.step()
    assert trainer.loss_sum.item() < mean - 0.2


# --- sign descent for embeddings


def looked_up(model: Small, ids: list[int], towards: torch.Tensor) -> None:
    (model.table(torch.tensor(ids)) * towards).sum().backward()


def test_rows_that_were_looked_up_move_by_the_sign_of_their_gradient() -> None:
    model, rate, decay = Small(), 0.01, 0.5
    optimizer = SparseSignSGD([model.table.weight], lr=rate, weight_decay=decay)
    expected = model.table.weight.detach().clone()
    # Row 3 is there twice: -1 + 3 > 0 in the first value, +1 - 3 < 0 in the second, 0 in the third.
    towards = torch.tensor([[-1.0, 1, 2, 0], [5, -5, 5, -5], [3, -3, -2, 0]])
    looked_up(model, [3, 7, 3], towards)
    optimizer.step()
    for row, signs in ((3, [1.0, -1, 0, 0]), (7, [1.0, -1, 1, -1])):
        expected[row] = expected[row] * (1 - rate * decay) - rate * torch.tensor(signs)
    torch.testing.assert_close(model.table.weight.detach(), expected)
    untouched = [row for row in range(9) if row not in (3, 7)]
    assert torch.equal(model.table.weight[untouched], expected[untouched])
    assert not optimizer.state


def test_gradients_of_several_batches_add_up() -> None:
    one, several = Small(), Small()
    looked_up(one, [2, 4, 4], torch.tensor([[1.0] * 4, [2.0] * 4, [-3.0] * 4]))
    looked_up(several, [2, 4], torch.tensor([[1.0] * 4, [2.0] * 4]))
    looked_up(several, [4], torch.tensor([[-3.0] * 4]))
    for model in (one, several):
        SparseSignSGD([model.table.weight], lr=0.1).step()
    assert torch.equal(one.table.weight, several.table.weight)


def test_the_guard_holds_sign_descent_too() -> None:
    model = Small()
    before = model.table.weight.detach().clone()
    looked_up(model, [1], torch.full((1, 4), float("nan")))
    optimizer = SparseSignSGD([model.table.weight], lr=0.1, weight_decay=0.1)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(model.table.weight, before)


def test_gradients_of_several_processes_add_up() -> None:
    """Each has other rows and another number of them; what fills up the shorter one is nothing."""

    class Two:
        count = 2

        def most(self, value: int) -> int:
            return 3

        def joined(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    whole = Small()
    towards = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    looked_up(whole, [2, 4, 4, 8, 2], towards)
    parts = []
    for chosen in ([0, 1, 2], [3, 4]):
        model = Small()
        ids = torch.tensor([2, 4, 4, 8, 2])[chosen]
        looked_up(model, ids.tolist(), towards[chosen])
        gradient = model.table.weight.grad
        assert gradient is not None
        rows, values = gradient._indices()[0], gradient._values()
        parts.append(everywhere(rows, values, Two()))  # type: ignore[arg-type]
    assert [len(rows) for rows, _ in parts] == [3, 3]
    rows, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    both = Small()
    with torch.sparse.check_sparse_tensor_invariants():
        both.table.weight.grad = torch.sparse_coo_tensor(rows[None], values, (9, 4))
    for model in (whole, both):
        SparseSignSGD([model.table.weight], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(whole.table.weight, both.table.weight)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_float16_cannot_hold_does_not_reach_the_table(bad: float) -> None:
    """The sign of infinity would be a step as good as any."""
    model = Small()
    before = model.table.weight.detach().clone()
    optimizer = SparseSignSGD([model.table.weight], lr=0.1, weight_decay=0.1)
    looked_up(model, [1, 2], torch.tensor([[1.0, 1, bad, 1], [1.0, 1, 1, 1]]))
    optimizer.step()
    assert torch.equal(model.table.weight, before)
    optimizer.zero_grad()
    looked_up(model, [1, 2], torch.ones(2, 4))
    optimizer.step()
    torch.testing.assert_close(model.table.weight[1:3], before[1:3] * 0.99 - 0.1)


def test_the_other_optimizers_leave_sparse_embeddings_out() -> None:
    optimizer: Any = make_optimizer(Small(), OptimConfig())
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == ["up.bias", "up.weight"]
