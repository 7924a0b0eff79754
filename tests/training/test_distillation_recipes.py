"""The recipes of distillation, and the lines of the documents, on tiny data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import helpers_distill
from tests.helpers_cli import SMALL
from tests.helpers_distill import RETENTION
from tests.helpers_training import WINDOW, token_directory
from tests.teachers.helpers import make_teacher
from thimble import api
from thimble.artifacts import read_json
from thimble.config.load import load
from thimble.config.schema import OptimConfig
from thimble.errors import DataError
from thimble.sweep.words import Words
from thimble.teachers.models import find
from thimble.training.data import teachers_now
from thimble.training.optimizer import schedule

# The documents' own line.
QUICKSTART = [
    "optim.weight_decay=0.01",
    "saddle.interventions=true",
    "optim.learning_rate=0.001",
    "teacher.topk=512",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers_distill.teacher_in(tmp_path_factory.mktemp("teacher"))


def tiny(output_dir: Path, *more: str) -> list[str]:
    """What makes any of the recipes small."""
    return [
        *SMALL,
        *RETENTION,
        f"data.path={token_directory()}",
        f"output_dir={output_dir}",
        f"training.sequence_length={WINDOW}",
        "training.max_steps=4",
        "training.log_every=2",
        "optim.warmup_steps=1",
        "logging.wandb=false",
        "precision=float32",
        *more,
    ]


def test_the_documents_numbers() -> None:
    direct, cached = load("distill_direct"), load("distill_cached", ["teacher.path=x"])
    assert (direct.teacher.topk, cached.teacher.topk) == (512, 128)
    assert (direct.objective.distill_alpha, cached.objective.distill_alpha) == (0.5, 0.2)
    assert direct.objective.temperature == cached.objective.temperature == 2
    assert (direct.optim.name, cached.optim.name) == ("muon", "adamw")
    assert direct.training.sequence_length == 8192
    assert load("pretrain_student").objective.name == "next_token"
    assert load("pretrain_student").model == direct.model


@pytest.mark.parametrize("recipe", ["distill_direct", "distill_nano"])
def test_the_line_of_the_quickstart(recipe: str, teacher: Path, tmp_path: Path) -> None:
    run = api.train(recipe, *QUICKSTART, *tiny(tmp_path, f"teacher.path={teacher}"))
    assert run.status == "finished"
    last = [record for record in run.metrics if "kl" in record][-1]
    assert last["kl"] > 0
    assert load(run.path).optim.weight_decay == 0.01


def test_the_sanity_run_evaluates_nothing(teacher: Path, tmp_path: Path) -> None:
    words = ["max_steps=10", "log_interval=1", "training.eval_every=0"]
    run = api.train("distill_direct", *tiny(tmp_path, f"teacher.path={teacher}", *words))
    assert run.step == 10
    assert len([r for r in run.metrics if "kl" in r]) == 10
    assert not [r for r in run.metrics if "val_loss" in r]
    assert run.latest is not None


def test_pretraining_then_a_teacher(teacher: Path, tmp_path: Path) -> None:
    first = api.train("pretrain_student", *tiny(tmp_path))
    assert not [r for r in first.metrics if "kl" in r]
    told = ["objective.name=distill", f"teacher.path={teacher}", "max_steps=6"]
    run = api.train(None, *told, resume=first.path)
    assert run.step == 6
    assert [r["to"] for r in run.metrics if r.get("event") == "objective"] == ["distill"]


def test_direct_then_cached(teacher: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    # Long enough for every window to have been asked about.
    kept = ["cache_logits=true", f"cache_dir={cache}", "max_steps=80", "training.eval_every=0"]
    api.train("distill_direct", *tiny(tmp_path, f"teacher.path={teacher}", *kept))
    run = api.train(
        "distill_cached",
        *tiny(tmp_path, f"cache_dir={cache}", "teacher.topk=5"),
    )
    assert run.status == "finished"


def test_the_newest_run_of_a_recipe_is_a_teacher(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    newest_run(teacher, runs / "20260101-000000-aaaaaa")
    (runs / "20260102-000000-bbbbbb" / "checkpoints").mkdir(parents=True)
    named = ["objective.name=distill", f"teacher.path={runs}"]
    assert list(teachers_now([load("distill_direct", named)])) == [str(runs)]
    served = ["teacher.mode=served", "teacher.url=http://localhost:1", "objective.temperature=1"]
    assert teachers_now([load("distill_direct", [*named, *served])]) == {}  # the server's name
    # The newest has no checkpoint yet.
    assert find(str(runs)).parts[-3] == "20260101-000000-aaaaaa"
    assert find(str(teacher)) == teacher
    assert load("distill_nano").teacher.path == "runs/slm_nano"
    with pytest.raises(DataError, match="thimble train slm_nano"):
        find("runs/slm_nano")
    with pytest.raises(DataError, match="no model at"):  # a checkpoint that is gone
        find("runs/slm_nano/20260101-000000-aaaaaa/checkpoints/step-000001")


def test_a_resumed_run_keeps_its_teacher_though_there_is_a_newer_one(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    newest_run(teacher, Path("runs/slm_nano/20260101-000000-aaaaaa"))
    words = ["objective.name=distill", "teacher.path=runs/slm_nano", "training.save_every=2"]
    first = api.train("distill_direct", *tiny(Path("students"), *words, "max_steps=2"))
    newest_run(make_teacher(tmp_path / "other", seed=9), Path("runs/slm_nano/20260102-000000-b"))
    again = api.train(resume=first.path, training={"max_steps": 4})
    assert first.latest is not None
    assert again.latest is not None
    before, after = (read_json(path / "teacher.json") for path in (first.latest, again.latest))
    assert before["identity"] == after["identity"]
    assert before["path"] == "runs/slm_nano/20260101-000000-aaaaaa/checkpoints/step-000001"


def newest_run(teacher: Path, run: Path) -> None:
    """A run whose only checkpoint is this model."""
    shutil.copytree(teacher, run / "checkpoints/step-000001")
    (run / "checkpoints/latest").write_text("step-000001\n")


def test_plateau_between_warm_up_and_cosine() -> None:
    config = OptimConfig(warmup_steps=10, plateau_steps=20, min_lr_ratio=0.1)
    rates = [schedule(config, step, 101) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:31] == [1.0] * 21
    assert rates[31:] == sorted(rates[31:], reverse=True)
    assert rates[31] < 1
    assert rates[-1] == pytest.approx(0.1)
    assert rates[65] == pytest.approx(0.55)


def test_names_of_the_documents() -> None:
    config = load("distill_nano", ["teacher.path=x", "teacher.temperature=3", "distill_alpha=0.7"])
    assert (config.objective.temperature, config.objective.distill_alpha) == (3, 0.7)
    words = ["teacher.topk=8,16", "teacher.temperature=1,2", "objective.distill_alpha=0.1"]
    found = Words.sorted_from(words, {})
    assert found.values() == {"teacher.topk": ["8", "16"], "objective.temperature": ["1", "2"]}
    assert found.fixed == {"objective.distill_alpha": 0.1}
