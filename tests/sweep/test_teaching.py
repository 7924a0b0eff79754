"""Runs of a sweep read what one teacher said once, and learn from it what they would have asked."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import helpers_distill, helpers_training
from tests.helpers_distill import config
from thimble import api
from thimble.artifacts import write_json
from thimble.config.load import load_run, save
from thimble.errors import ConfigError, DataError
from thimble.objectives.sparse_targets import SparseTargets, likeliest
from thimble.sweep import Sweep, ledger, teaching
from thimble.teachers import models
from thimble.teachers.asked import narrowed
from thimble.teachers.cache import TeacherCache
from thimble.training import train
from thimble.training.rows import WindowRows
from thimble.training.run import RunFolder

SHORT = ["training.max_steps=4", "training.log_every=1", "training.eval_every=2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers_distill.teacher_in(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every time that a teacher is loaded."""
    found: list[Any] = []
    inner = models.load

    def load(name: Any, **options: Any) -> Any:
        found.append(name)
        return inner(name, **options)

    monkeypatch.setattr(models, "load", load)
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sweep(folder: Path, teacher: Path | None, *words: str, base: tuple[str, ...] = ()) -> Sweep:
    path = folder / "config.yaml"
    save(config(folder / "runs", teacher, *SHORT, *base), path)
    return api.sweep(path, *words)


def test_the_teacher_is_loaded_and_asked_once(
    teacher: Path, tmp_path: Path, loads: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="thimble")
    words = ["teacher.topk=5,20", "teacher.temperature=1,2", "distill_alpha=0.1"]
    found = sweep(tmp_path, teacher, *words, "training.eval_every=4")
    assert len(loads) == 1
    assert [run["status"] for run in found.runs] == ["finished"] * 4
    assert set(found.swept) == {"teacher.topk", "objective.temperature"}
    (line,) = [r.message for r in caplog.records if r.message.startswith("teacher asked once")]
    assert "for 4 runs" in line
    assert "20 likeliest at temperature 1, 2" in line
    (folder,) = (tmp_path / "data/teacher_cache").iterdir()
    cache = TeacherCache(folder)
    asked = int(cache.filled(np.arange(cache.count)).sum())
    assert f"{asked * cache.length:,} tokens" in line
    assert asked == 4 * 4 < cache.count  # what four steps see, and no more

    # Each run is the one that asks its teacher itself; the likeness is over the most tokens.
    for run in found.runs:
        values = run["overrides"]
        used = load_run(run["run"]).teacher
        assert (used.mode, used.topk) == ("cached", values["teacher.topk"])
        assert run["val_teacher_kl"] > 0
        if values == {"teacher.topk": 5, "objective.temperature": 2}:
            options = [f"{key}={value}" for key, value in values.items()]
            options += ["distill_alpha=0.1", "training.eval_every=4"]
            alone = train(config(tmp_path / "alone", teacher, *SHORT, *options))
            mine = [r for r in RunFolder(run["run"]).records() if "event" not in r]
            theirs = [r for r in alone.metrics if "event" not in r]
            for key in ("loss", "kl", "val_loss", "val_teacher_agreement"):
                one, other = ([r[key] for r in rs if key in r] for rs in (mine, theirs))
                assert one
                assert one == pytest.approx(other, rel=3e-3, abs=2e-3), key
    table = [column.header for column in found.table().columns]
    for name in ("bits per byte", "loss", "KL to teacher", "agreement"):
        assert name in table

    del loads[:]
    caplog.clear()
    api.sweep(
        tmp_path / "config.yaml",
        *words[:1],
        "teacher.temperature=2,1",
        "training.eval_every=4",
        "training.max_steps=1",
    )
    assert len(loads) == 1
    assert any(r.message.startswith("teacher was asked before") for r in caplog.records)


@pytest.mark.parametrize("word", ["teacher.topk=5,20", "teacher.sampled=false,true"])
def test_a_resumed_sweep_keeps_its_teacher_though_there_is_a_newer_one(
    teacher: Path, tmp_path: Path, word: str
) -> None:
    def newest(model: Path, name: str) -> Path:
        checkpoint = Path("runs/slm_nano") / name / "checkpoints/step-000001"
        shutil.copytree(model, checkpoint)
        (checkpoint.parent / "latest").write_text("step-000001\n")
        return checkpoint

    one = newest(teacher, "20260101-000000-aaaaaa")
    words = [word, "training.eval_every=4"]
    found = sweep(tmp_path, Path("runs/slm_nano"), *words)
    newest(helpers_distill.teacher_in(tmp_path, seed=9), "20260102-000000-bbbbbb")
    account = ledger.read(found.folder)
    account["runs"][1] = {**account["runs"][1], "status": "waiting"}
    write_json(found.folder / ledger.LEDGER, account)
    again = api.sweep(resume=found.folder)
    assert again.runs[1]["run"] != found.runs[1]["run"]
    assert [load_run(run["run"]).teacher.path for run in again.runs] == [str(one)] * 2


def test_fewer_tokens_of_a_larger_answer_are_exact() -> None:
    """The tail's mass at each temperature is kept, so nothing has to be guessed."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)
    head = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    whole = likeliest(hidden, head, 24, (1.0, 2.0, 0.5, 4.0))
    for k, temperatures in ((24, (2.0,)), (7, (4.0, 1.0)), (1, (0.5,))):
        less, direct = narrowed(whole, k, temperatures), likeliest(hidden, head, k, temperatures)
        assert isinstance(less, SparseTargets)
        assert torch.equal(less.indices, direct.indices)
        assert less.temperatures == temperatures
        for temperature in temperatures:
            for one, other in zip(less.at(temperature), direct.at(temperature), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_draws_are_shared_by_runs_of_one_temperature_and_seed(
    teacher: Path, tmp_path: Path, loads: list[Any]
) -> None:
    def run(*words: str) -> Any:
        return config(tmp_path, teacher, "teacher.sampled=true", *SHORT, *words)

    words = ["objective.temperature=1", "objective.temperature=2"]
    runs = [run(word, f"teacher.topk={k}") for word in words for k in (4, 9)]
    runs.append(run("seed=2"))
    caches = teaching.prepare(runs, here=True)
    assert len({found["cache"] for found in caches.values()}) == 2 == len(loads)
    for each in runs[:4]:
        used = teaching.taught(each, caches)
        assert used.teacher.mode == "cached"
        assert used.teacher.cache is not None
        cache = TeacherCache(used.teacher.cache)
        assert cache.asked.temperatures == (each.objective.temperature,)
        assert cache.asked.k == 9
    assert teaching.taught(runs[4], caches) == runs[4]


def test_a_cache_that_does_not_hold_what_a_run_wants_is_said_first(
    teacher: Path, tmp_path: Path
) -> None:
    caches = teaching.prepare(
        [config(tmp_path, teacher, *SHORT, f"teacher.topk={k}") for k in (4, 9)], here=True
    )
    (found,) = caches.values()
    base = ("teacher.mode=cached", f"teacher.cache={found['cache']}")
    with pytest.raises(DataError, match="it holds"):
        sweep(tmp_path, teacher, "teacher.topk=9,10", base=base)
    assert not (tmp_path / "runs" / "slm_nano").exists()
    # Drawn values may be beyond those that were looked at: that run asks by itself.
    more = config(tmp_path, teacher, *SHORT, "teacher.topk=10")
    assert teaching.taught(more, caches) == more


def test_where_nobody_knows_the_bytes_the_loss_decides(tmp_path: Path) -> None:
    packed = helpers_distill.packed_in(tmp_path)
    found = sweep(tmp_path, None, "optim.learning_rate=1e-2,1e-5", base=(f"data.path={packed}",))
    losses = [run["val_loss"] for run in found.runs]
    assert losses == sorted(losses)
    assert found.best is not None
    assert found.best["overrides"] == {"optim.learning_rate": 0.01}
    assert ledger.unit(found.runs) == "nats per token"
    assert [plot.name for plot in found.plots] == ["sweep.png", "curves.png"]


def test_runs_of_different_units_are_not_ranked_together(tmp_path: Path) -> None:
    packed, other = helpers_distill.packed_in(tmp_path), tmp_path / "other"
    known = helpers_training.token_directory()
    said = f"bits per byte for data.path={known}\n.*nats per token of .* for data.path={packed}"
    with pytest.raises(ConfigError, match=said):
        sweep(tmp_path, None, f"data.path={known},{packed}")
    shutil.copytree(packed, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="cannot be ranked together"):
        sweep(tmp_path, None, f"data.path={packed},{other}")
    assert not (tmp_path / "runs").exists()


def test_rows_that_are_passed_over_are_asked_about_generously(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip = "training.skip_windows=[[5,6]]"
    mine = config(tmp_path, teacher, *SHORT, skip)
    seen: list[int] = []
    inner = WindowRows.batch

    def batch(self: WindowRows, place: int, size: int) -> Any:
        found = inner(self, place, size)
        seen.extend(found.numbers.tolist())
        return found

    monkeypatch.setattr(WindowRows, "batch", batch)
    train(mine)
    assert set(seen) <= set(teaching.seen(mine).tolist())


def test_a_run_of_other_rows_asks_by_itself(teacher: Path, tmp_path: Path) -> None:
    runs = [config(tmp_path, teacher, *SHORT, f"teacher.topk={k}") for k in (5, 20)]
    caches = teaching.prepare(runs, here=True)
    assert teaching.taught(runs[0], caches).teacher.mode == "cached"
    longer = config(tmp_path, teacher, *SHORT, "training.max_steps=9")
    assert teaching.question(longer) == teaching.question(runs[0])
    assert teaching.taught(longer, caches).teacher.mode == "direct"


def test_a_sweep_without_evaluations_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.eval_every=4"):
        sweep(tmp_path, teacher, "teacher.topk=5,20", base=("training.eval_every=0",))
