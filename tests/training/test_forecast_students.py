"""What a plan says of a student counts its teacher: loaded beside it, or its cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import helpers_distill
from tests.helpers_distill import config
from tests.helpers_training import WINDOW, token_directory
from thimble.config.model import ModelConfig
from thimble.models import interop
from thimble.teachers.cache import position_bytes
from thimble.training import forecast, memory, plan
from thimble.training.distillation import asked_of

WIDE = [
    *("model.hidden_size=64", "model.intermediate_size=256", "model.head_dim=32"),
    *("training.sequence_length=32", "training.micro_batch_size=64"),
    "training.gradient_accumulation_steps=1",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5}
    return helpers_distill.teacher_in(tmp_path_factory.mktemp("teacher"), **shape)


def shape_of(teacher: Path) -> ModelConfig:
    return interop.read_config(teacher)


def test_the_teacher_is_counted_in_time_and_memory(teacher: Path, tmp_path: Path) -> None:
    chosen, alone = config(tmp_path, teacher, *WIDE), config(tmp_path, None, *WIDE)
    found, without = plan.plan(chosen), plan.plan(alone)
    shape = shape_of(teacher)
    # Two for each weight that multiplies, and what positions take of one another.
    expected = 2 * shape.num_parameters + 5 * 4 * shape.head_dim * 32 * 2.0
    if not shape.tie_word_embeddings:
        expected -= 2 * shape.vocab_size * shape.hidden_size
    assert found.teacher is not None
    assert found.teacher.flops_per_token == pytest.approx(expected)
    added = found.flops_per_token - without.flops_per_token
    assert added == pytest.approx(expected)
    assert without.teacher is None
    parts = memory.peak_memory(chosen, torch.float32, "cpu")
    assert parts.teacher == 4 * shape.num_parameters
    smaller = memory.peak_memory(alone, torch.float32, "cpu")
    assert parts.total > smaller.total + parts.teacher
    json.dumps(found.to_dict())


def test_a_cache_is_counted_in_bytes(teacher: Path, tmp_path: Path) -> None:
    words = ["teacher.mode=cached", f"teacher.cache={tmp_path}", "objective.temperature_start=4"]
    chosen = config(tmp_path, teacher, *words)
    found = plan.plan(chosen).teacher
    assert found is not None
    assert found.flops_per_token == 0
    vocabulary = json.loads((Path(token_directory()) / "manifest.json").read_text())["vocab_size"]
    each = position_bytes(asked_of(chosen), vocabulary)
    assert found.cache_bytes_per_token == each == 9 * 4 + 20 * 4
    assert found.cache_bytes == each * WINDOW * plan.plan(chosen).examples
    parts = memory.peak_memory(chosen, torch.float32, "cpu")
    assert parts.teacher == 0


def test_a_teacher_that_is_not_here_is_said(tmp_path: Path) -> None:
    found = plan.plan(config(tmp_path, Path("meta-llama/Nobody-7B")))
    assert any("meta-llama/Nobody-7B is not here" in warning for warning in found.warnings)
    known = plan.plan(config(tmp_path, Path("meta-llama/Llama-3.2-1B"))).teacher
    assert known is not None
    assert known.parameters == 1_235_814_400  # as its page on the hub says


def test_the_peak_of_the_process_is_predicted_within_a_tenth(teacher: Path, tmp_path: Path) -> None:
    found = forecast.forecast(config(tmp_path, teacher, *WIDE, "model.num_hidden_layers=3"))
    assert found.memory.total == pytest.approx(found.here["peak_measured"], rel=0.1)
