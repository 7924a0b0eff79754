"""Students in two processes are students in one, however their teacher is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import helpers_distill
from tests import helpers_training as helpers
from tests.training.several_processes import STUDENTS, student_config
from tests.training.test_distributed import several_processes, the_run
from thimble.teachers.cache import TeacherCache
from thimble.training import train


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students")
    helpers_distill.teacher_in(folder)
    train(student_config("recording", folder / "recording" / "one", folder))
    # What one process recorded is what both read in the cached runs; two record their own.
    shutil.move(folder / "recorded", folder / "cache")
    child = several_processes(folder, "students")
    for kind in ("direct", "cached"):
        train(student_config(kind, folder / kind / "one", folder))
    _, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    return folder


def assert_same(run: Path, one: Path) -> None:
    ours, theirs = helpers.timeless(run), helpers.timeless(one)
    assert len(ours) == len(theirs) > 2
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
    weights, others = (
        load_file(path / "checkpoints" / "step-000006" / "model.safetensors") for path in (run, one)
    )
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", STUDENTS)
def test_two_processes_are_one(kind: str, output: Path) -> None:
    assert_same(the_run(output / kind / "two"), the_run(output / kind / "one"))


def test_sharded_students_are_one(output: Path) -> None:
    for rank in (0, 1):
        assert json.loads((output / f"{rank}.json").read_text())["fsdp"] == {"error": None}
    assert_same(the_run(output / "fsdp" / "two"), the_run(output / "direct" / "one"))


def test_both_processes_record_into_one_cache(output: Path) -> None:
    two, one = TeacherCache(output / "recorded"), TeacherCache(output / "cache")
    everything = np.arange(one.count)
    there = two.filled(everything)
    assert there.any()
    assert (there == one.filled(everything)).all()
    rows = np.flatnonzero(there)
    mine, theirs = two.read(rows), one.read(rows)
    assert torch.equal(mine.indices, theirs.indices)
    torch.testing.assert_close(mine.log_probs, theirs.log_probs, rtol=2e-3, atol=1e-3)
