"""Muon does what torch's own does, matrix by matrix, and leaves everything else to AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import helpers_training as helpers
from thimble.config.schema import OptimConfig
from thimble.models.layers import Linear, RMSNorm
from thimble.training.guards import StepGuard
from thimble.training.optimizer import Muon, make_optimizer, orthogonal


def config(**changes: object) -> OptimConfig:
    return OptimConfig(name="muon", learning_rate=0.01, **changes)  # type: ignore[arg-type]


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 8)
        self.norm = RMSNorm(8, 1e-5)
        self.up = Linear(8, 16, 24)
        self.down = Linear(40, 8)
        self.head = torch.nn.Linear(8, 11, bias=False)


def set_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(x))
    assert values.min() > 0.3
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.cosine_similarity(orthogonal(x).flatten(1), (left @ right).flatten(1))
    assert cosine.min() > 0.95


def test_matrices_move_as_with_the_optimizer_of_torch() -> None:
    model, reference = Small(), Small()
    mine = make_optimizer(model, config(weight_decay=0.1))
    assert isinstance(mine, Muon)
    up = [torch.nn.Parameter(part.detach().clone()) for part in reference.up.weight.split([16, 24])]
    theirs = torch.optim.Muon(
        [*up, reference.down.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for seed in range(5):
        set_gradients(model, seed)
        for part, grad in zip(up, model.up.weight.grad.split([16, 24]), strict=True):  # type: ignore[union-attr]
            part.grad = grad.clone()
        reference.down.weight.grad = model.down.weight.grad.clone()  # type: ignore[union-attr]
        mine.step()
        theirs.step()
    # torch's iterates in bfloat16, which has three digits.
    torch.testing.assert_close(model.up.weight, torch.cat(up), rtol=0.02, atol=2e-3)
    torch.testing.assert_close(model.down.weight, reference.down.weight, rtol=0.02, atol=2e-3)


def test_what_is_no_matrix_moves_as_with_adamw() -> None:
    model, reference = Small(), Small()
    mine = make_optimizer(model, config())
    names = ("embedding.weight", "norm.weight", "head.weight")
    theirs = torch.optim.AdamW(
        [reference.get_parameter(name) for name in names],
        lr=0.01,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(reference, seed)
        mine.step()
        theirs.step()
    for name in names:
        assert torch.equal(model.get_parameter(name), reference.get_parameter(name)), name


def test_a_step_that_the_guard_refuses_changes_nothing() -> None:
    model = Small()
    optimizer = make_optimizer(model, config())
    set_gradients(model, 0)
    optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = optimizer.state[model.down.weight]["momentum"].clone()
    guard = StepGuard(torch.device("cpu"), 1000.0)
    set_gradients(model, 1)
    model.down.weight.grad[0, 0] = float("nan")  # type: ignore[index]
    norm = torch.tensor(float("nan"))
    optimizer.found_inf = guard.observe(1, torch.tensor(1.0), norm, False)  # type: ignore[attr-defined]
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(optimizer.state[model.down.weight]["momentum"], momentum)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_is_for_the_matrices_of_the_blocks(name: str, tmp_path: Path) -> None:
    optimizer = helpers.trainer(helpers.config(tmp_path, f"optim={name}")).optimizer
    decayed, kept = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert all("norm" not in each and "embedding" not in each for each in decayed["names"])
    kinds = {each.split(".")[-2] for each in decayed["names"]}
    assert kinds == {"qkv", "output", "gate_up", "down"}


def test_what_adamw_updates_has_its_own_rate(tmp_path: Path) -> None:
    options = ["optim=muon", "optim.adamw_lr_ratio=3.0", "optim.warmup_steps=0"]
    trainer = helpers.trainer(helpers.config(tmp_path, *options, "optim.learning_rate=0.01"))
    trainer.step()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.01, 0.03])
