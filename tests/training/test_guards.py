"""Every guard, provoked for real: it stops with a reason, the last good checkpoint untouched."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from tests import helpers_training as helpers
from thimble.errors import EnvironmentProblem, GuardStop
from thimble.training import checkpoint, loop, train
from thimble.training.loop import Trainer
from thimble.training.run import RunFolder


def only_run(tmp_path: Path) -> Path:
    (run,) = (tmp_path / "slm_nano").iterdir()
    return run


def guard_event(run: Path) -> dict[str, object]:
    (event,) = [r for r in RunFolder(run).records() if r.get("event") == "guard"]
    return event


def poison(monkeypatch: pytest.MonkeyPatch, at: int, value: float) -> None:
    """Make one weight of the model ``value`` just before the step ``at``."""
    inner = Trainer.step

    def step(self: Trainer) -> None:
        if self.state.step == at:
            with torch.no_grad():
                self.model.blocks[0].mlp.down.weight[0, 0] = value  # type: ignore[union-attr,index]
        inner(self)

    monkeypatch.setattr(Trainer, "step", step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_within_the_step(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 6, value)
    with pytest.raises(GuardStop, match=r"Stopped at step 6.*step-000004.*learning_rate"):
        train(helpers.config(tmp_path))
    run = only_run(tmp_path)
    assert guard_event(run)["kind"] == "nan"
    assert guard_event(run)["windows"] == [24, 28]
    assert "GuardStop" in (run / "error.txt").read_text()
    assert RunFolder(run).pointed("latest").name == "step-000004"  # type: ignore[union-attr]
    assert not checkpoint.problems(run / "checkpoints" / "step-000004")
    assert [name for _, name in checkpoint.steps(run / "checkpoints")] == [
        run / "checkpoints" / "step-000004"
    ]


def test_a_bad_step_leaves_weights_and_moments_alone(tmp_path: Path) -> None:
    trainer = helpers.trainer(helpers.config(tmp_path, "guards.max_grad_norm=1000"))
    trainer.step()
    before = [p.clone() for p in trainer.model.parameters()]
    moments = [
        s.get("exp_avg", s.get("momentum")).clone() for s in trainer.optimizer.state.values()
    ]
    trainer.guard.max_grad_norm = 1e-9  # any gradient explodes now
    for _ in range(2):  # the first bad step, and one that follows before anybody has looked
        trainer.step()
    after = list(trainer.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    now = [s.get("exp_avg", s.get("momentum")) for s in trainer.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now, strict=True))
    verdict = trainer.guard.verdict(synchronize=True)
    assert verdict is not None
    assert (verdict.kind, verdict.step) == ("explosion", 1)


def test_an_exploding_learning_rate_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(GuardStop, match=r"gradient norm|loss is") as stopped:
        train(
            helpers.config(
                tmp_path,
                "optim.learning_rate=1.0",
                "optim.warmup_steps=0",
                "optim.weight_decay=0",
                "guards.max_grad_norm=4",
                "model.initializer_range=0.5",
            )
        )
    assert stopped.value.status == 4
    assert guard_event(only_run(tmp_path))["kind"] in ("explosion", "nan")


def test_a_plateau_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(GuardStop, match="smoothed loss has not fallen"):
        train(
            helpers.config(
                tmp_path,
                "optim.learning_rate=1e-12",
                "guards.plateau_steps=20",
                "training.max_steps=400",
                "training.eval_every=400",
            )
        )
    event = guard_event(only_run(tmp_path))
    assert event["kind"] == "plateau"
    assert int(str(event["step"])) >= 20


def test_out_of_memory_names_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Trainer.step

    def step(self: Trainer) -> None:
        if self.state.step == 5:
            torch.empty(1 << 60, dtype=torch.uint8)  # the allocator itself refuses
        inner(self)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(GuardStop, match=r"micro_batch_size=1 .*accumulation_steps=4"):
        train(helpers.config(tmp_path))
    assert guard_event(only_run(tmp_path))["kind"] == "out_of_memory"


def test_other_errors_are_not_taken_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Trainer) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match="something else"):
        train(helpers.config(tmp_path))
    assert "something else" in (only_run(tmp_path) / "error.txt").read_text()


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(value: object, path: Path) -> None:
        if "step-000008" in str(path) and path.name == "optimizer.pt":
            save(value, path)
            os.truncate(path, 10)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path)

    monkeypatch.setattr(loop.checkpoint.torch, "save", full)
    with pytest.raises(EnvironmentProblem, match="disk is full"):
        train(helpers.config(tmp_path))
    folder = RunFolder(only_run(tmp_path))
    assert folder.pointed("latest").name == "step-000004"  # type: ignore[union-attr]
    assert [path.name for path in folder.checkpoints.iterdir() if path.is_dir()] == ["step-000004"]
    monkeypatch.undo()
    assert train(helpers.config(tmp_path), resume=folder.path).step == 12
