"""Saddles in a run: in its records and checkpoints, in the rate, and the same after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers_training import config, state_of, timeless
from thimble.report import report
from thimble.training import train
from thimble.training.run import Run, RunFolder

# Every stretch of four steps counts as standing still, so saddles come soon and at known steps.
EASY = [
    "saddle.patience=4",
    "saddle.min_improvement=0.99",
    "saddle.grad_norm_ratio=100",
    "saddle.finished=1",
    "saddle.escape=0.9",
    "saddle.cooldown=3",
    "training.log_every=1",
    "training.eval_every=100",
    "training.max_steps=72",
    "training.save_every=24",
    "optim.warmup_steps=1",
    "optim.min_lr_ratio=1",
    "optim.learning_rate=1e-4",
]


def events(path: Path) -> list[dict[str, object]]:
    found = RunFolder(path).records()
    return [record for record in found if record.get("event", "").startswith("saddle")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("saddle")
    return train(config(folder, *EASY, "saddle.interventions=true"))


def test_an_intervention_raises_the_rate_for_its_steps_and_no_longer(run: Run) -> None:
    first, second = events(run.path)[:2]
    assert first["event"] == "saddle"
    assert first["intervention"] == {"learning_rate": 1.5, "steps": 50}
    begin = int(str(first["step"]))
    assert second["event"] == "saddle_stays"
    assert second["step"] == begin + 50
    rates = {r["step"]: r["learning_rate"] for r in run.metrics if "learning_rate" in r}
    assert max(rates) > begin + 54
    for step in range(1, begin + 54):  # the next saddle is looked for after that
        raised = begin < step <= begin + 50
        assert rates[step] == pytest.approx(1.5e-4 if raised else 1e-4), step


def test_resumed_in_an_intervention_equals_uninterrupted(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    for path in sorted((folder / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    kept = json.loads((folder / "checkpoints/step-000024/trainer_state.json").read_text())
    assert kept["saddle"]["factor"] == 1.5
    again = train(config(tmp_path, *EASY, "saddle.interventions=true"), resume=folder)
    assert again.latest is not None
    assert run.latest is not None
    assert state_of(again.latest) == state_of(run.latest)
    assert timeless(folder) == timeless(run.path)
    assert events(folder) == events(run.path)  # none twice


def test_without_interventions_it_is_only_told(tmp_path: Path) -> None:
    run = train(config(tmp_path, *EASY))
    found = events(run.path)
    assert len(found) > 1
    assert {event["event"] for event in found} == {"saddle"}
    assert all(event["intervention"] is None for event in found)
    assert {r["learning_rate"] for r in run.metrics if "learning_rate" in r} == {1e-4}
    made = report(run.path)
    assert "finished at step 72" in made.path.read_text()
