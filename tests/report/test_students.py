"""A student's page: its teacher over training, saddles, needles as maps, what a context costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import helpers_distill
from tests.helpers_evaluation import best
from thimble import api
from thimble.artifacts import write_json
from thimble.evaluation import evaluate as module
from thimble.report.students import context_charts, needle_charts, saddles
from thimble.training import train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    teacher = helpers_distill.teacher_in(tmp_path)
    return train(helpers_distill.config(tmp_path / "runs", teacher)).path


def needle(**models: list[int]) -> dict[str, Any]:
    def cells(lengths: list[int]) -> list[dict[str, Any]]:
        return [
            {"length": n, "depth": depth, "accuracy": depth, "choice": 0.5, "nats": 3 * depth}
            for n in lengths
            for depth in (0.0, 0.5, 1.0)
        ]

    return {
        "depths": [0.0, 0.5, 1.0],
        "chance": 1 / 64,
        "models": {
            name: {"cells": cells(n), "without": [{"length": x, "accuracy": 0.0} for x in n]}
            for name, n in models.items()
        },
    }


def test_the_page_of_a_student(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEXTS", 2)
    event = {"event": "saddle", "step": 7, "at_loss": 3.25, "grad_norm": 0.5, "intervention": None}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(event) + "\n")
    evaluated = api.evaluate(run, context=True, lengths=[8, 32], device="cpu").to_dict()
    report = best(run) / "evaluation_report.json"
    write_json(report, {**evaluated, "needle": needle(student=[64, 128], teacher=[64])})
    made = api.report(run)
    html = made.path.read_text()
    drawn = ["kl", "teacher_agreement", "calibration_error", "ce", "mix", "needle_accuracy"]
    drawn += ["needle_nats", "context_state_bytes", "context_decode_tokens_per_second"]
    for name in drawn:
        assert f'id="{name}"' in html, name
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>Saddles</h2>" in html
    assert "at a saddle: the loss is 3.250" in html
    for heading in ("beside the teacher", "student: needles found", "teacher: nats gained",
                    "student after"):  # fmt: skip
        assert heading in html
    assert 'id="context_peak_bytes"' not in html  # nobody counts it on a CPU


def test_what_is_not_there_is_not_drawn() -> None:
    assert list(needle_charts(needle())) == []
    (accuracy, nats) = needle_charts(needle(student=[64]))
    assert (accuracy.name, nats.name) == ("needle_accuracy", "needle_nats")
    assert list(context_charts({"models": {"student": {"rows": []}}, "lengths": []})) == []
    assert saddles([{"event": "finished", "step": 3}]) == []
