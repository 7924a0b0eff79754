"""Runs that fill a cache, and runs that read one: stopped, resumed, of another teacher."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import helpers_distill
from tests.helpers_distill import config
from tests.helpers_training import state_of, timeless
from tests.teachers.helpers import examples
from thimble.errors import DataError
from thimble.sweep import teaching
from thimble.teachers import Asked, held_out, models
from thimble.teachers.cache import TeacherCache
from thimble.teachers.direct import DirectTeacher, open_direct
from thimble.teachers.held_out import HeldOutRows
from thimble.training import train
from thimble.training.run import Run, RunFolder

SCHEDULES = ["objective.temperature_start=4", "objective.distill_alpha_start=0.9"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers_distill.teacher_in(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of training that a teacher is asked about."""
    found: list[int] = []
    inner = DirectTeacher.targets

    def targets(self: DirectTeacher, numbers: Sequence[int], inputs: Tensor, *rest: Any) -> Any:
        if not isinstance(numbers, range):  # that is what evaluations give
            found.extend(numbers)
        return inner(self, numbers, inputs, *rest)

    monkeypatch.setattr(DirectTeacher, "targets", targets)
    return found


def stopped(whole: Run, folder: Path) -> Path:
    """The run as it was after its first checkpoint."""
    shutil.copytree(whole.path, folder)
    for path in sorted((folder / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    return folder


def test_from_a_cache_resumed_equals_uninterrupted(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SCHEDULES, "training.save_every=5", "training.log_every=3"]
    chosen = config(tmp_path, teacher, *words)
    caches = teaching.prepare(
        [chosen, config(tmp_path, teacher, *words, "teacher.topk=7")], here=True
    )
    cached = teaching.taught(chosen, caches)
    assert cached.teacher.mode == "cached"
    whole = train(cached)
    assert len({r["temperature"] for r in whole.metrics if "temperature" in r}) > 2
    monkeypatch.setattr(
        models, "load", None
    )  # from here on nobody is loaded, for evaluations either
    again = train(cached, resume=stopped(whole, tmp_path / "stopped"))
    assert again.latest is not None
    assert whole.latest is not None
    assert state_of(again.latest) == state_of(whole.latest)
    assert timeless(again.path) == timeless(whole.path)
    kept = [r for r in again.metrics if "val_teacher_kl" in r]
    assert len(kept) == 3


def test_what_is_recorded_is_not_asked_again(
    teacher: Path, tmp_path: Path, asked: list[int]
) -> None:
    """Stopped at any step, the next run, or the same one resumed, goes on with the cache."""
    words = ["teacher.cache_logits=true", f"teacher.cache={tmp_path / 'cache'}"]
    words += ["training.save_every=4", "training.eval_every=100"]
    first = train(config(tmp_path, teacher, *words, "training.max_steps=4"))
    before = asked.copy()
    assert len(before) == len(set(before)) == 4 * 4
    train(config(tmp_path, teacher, *words, "training.max_steps=6"))
    assert len(asked) == len(set(asked)) == 6 * 4
    train(config(tmp_path, teacher, *words, "training.max_steps=8"), resume=first.path)
    assert len(asked) == len(set(asked)) == 8 * 4


CHILD = """
import os, signal, sys
from pathlib import Path
from tests.helpers_distill import config
from thimble.training import train
rows, pwrite = [], os.pwrite
def killed(file, data, at):
    rows.append(at)
    if len(rows) == 4 * 6 + 2:  # the second row of the seventh step, and half of it
        pwrite(file, data[:len(data) // 2], at)
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(file, data, at)
os.pwrite = killed
train(config(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
"""


def test_killed_while_it_records_and_resumed_equals_uninterrupted(
    teacher: Path, tmp_path: Path
) -> None:
    """A step that is made again learns from the cache what it learned from the teacher."""
    chosen = [*SCHEDULES, "teacher.cache_logits=true", "training.save_every=4"]
    chosen += ["training.log_every=1", "training.eval_every=12"]

    def words(name: str) -> list[str]:
        return [*chosen, f"teacher.cache={tmp_path / name / 'cache'}"]

    whole = train(config(tmp_path / "whole", teacher, *words("whole")))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "killed"), str(teacher)]
    done = subprocess.run([*command, *words("killed")], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    run = next((tmp_path / "killed/slm_nano").iterdir())
    assert RunFolder(run).records()[-1]["step"] == 6
    again = train(config(tmp_path / "killed", teacher, *words("killed")), resume=run)
    assert again.latest is not None
    assert whole.latest is not None
    assert state_of(again.latest) == state_of(whole.latest)
    assert timeless(again.path) == timeless(whole.path)
    caches = [TeacherCache(tmp_path / name / "cache") for name in ("whole", "killed")]
    assert caches[1].forget_damaged() == 0
    assert np.array_equal(*(cache.index for cache in caches))


@pytest.mark.parametrize("change", ["teacher", "precision", "question"])
def test_a_cache_is_not_mixed(teacher: Path, tmp_path: Path, change: str) -> None:
    words = ["teacher.cache_logits=true", f"teacher.cache={tmp_path / 'cache'}"]
    words += ["training.max_steps=2", "training.save_every=2", "training.eval_every=100"]
    first = train(config(tmp_path, teacher, *words))
    words += ["training.max_steps=4"]
    other, said = teacher, {"precision": "another precision", "question": "it holds"}.get(change)
    if change == "teacher":
        other, said = helpers_distill.teacher_in(tmp_path, seed=9), "another teacher"
    words += {"precision": ["precision=bfloat16"], "question": ["objective.temperature=3"]}.get(
        change, []
    )
    with pytest.raises(DataError, match=said):
        train(config(tmp_path, other, *words), resume=first.path)


def test_two_runs_keep_what_is_said_of_held_out_text_once(teacher: Path, tmp_path: Path) -> None:
    rows = HeldOutRows(examples())
    rows.note(torch.arange(48).view(4, 12), torch.zeros(4, 12, dtype=torch.int64), None)
    direct = open_direct(teacher, examples(), Asked(4), device=torch.device("cpu"))
    asked, begun = [0, 0], threading.Event()

    class Slow:
        asked, identity, precision = direct.asked, direct.identity, direct.precision

        def __init__(self, number: int) -> None:
            self.number = number

        def targets(self, numbers: Sequence[int], *rest: Any) -> Any:
            begun.set()
            time.sleep(0.3)
            asked[self.number] += len(numbers)
            return direct.targets(numbers, *rest)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(held_out.keep, tmp_path, rows, Slow(0))
        assert begun.wait(10)
        second = pool.submit(held_out.keep, tmp_path, rows, Slow(1))
        assert first.result() == second.result()
    assert asked == [4, 0]
    assert held_out.find(tmp_path, rows, Asked(4), direct.identity) is not None


def test_rows_with_nothing_to_predict_are_known_and_filling_is_any() -> None:
    rows = HeldOutRows(examples())
    text, filling = torch.arange(24).view(2, 12), torch.zeros(1, 12, dtype=torch.int64)
    nothing = torch.full((3, 12), -100)
    rows.note(torch.cat([text, filling]), nothing, None)
    assert rows.count == 2
    assert rows.numbers(torch.cat([filling, text.flip(0)]), None) == [0, 1, 0]
    with pytest.raises(DataError, match="no teacher was asked"):
        rows.numbers(text + 1, None)
