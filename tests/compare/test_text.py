"""A recursive student of text beside plain ones: of its mixer, its objective, its teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from tests import helpers_distill, helpers_recursion, helpers_training
from thimble import api, compare
from thimble.config.load import load, load_run
from thimble.config.model import RECURSIVE_KEYS
from thimble.errors import ConfigError
from thimble.evaluation.comparison import COMPUTATION, PARAMETERS, RECURSIVE
from thimble.training import train
from thimble.training.run import RunFolder

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("text")
    teacher = helpers_distill.teacher_in(home)
    short = (f"training.max_steps={STEPS}", "training.eval_every=2", "training.log_every=2")
    config = helpers_distill.config(home, teacher, *helpers_distill.RECURSIVE, *short)
    return train(config).path


def test_beside_plain_students_of_the_same_teacher(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = api.compare(run=run)
    assert [row.name for row in found.rows] == [RECURSIVE, COMPUTATION, PARAMETERS]
    assert (found.kind, found.split, found.waiting) == ("tokens", "test", [])
    mine = load_run(found.run)
    for row in found.rows[1:]:
        its = load_run(row.run)
        assert (its.model.schedule, its.model.mixer) == ("once", "retention")
        assert (its.objective, its.teacher, its.seed) == (mine.objective, mine.teacher, mine.seed)
        assert row.updates == STEPS
        assert row.epochs == found.rows[0].epochs
    assert found.rows[1].layers > found.rows[2].layers
    for row in found.rows:
        report = next(row.run.glob("checkpoints/*/evaluation_report.json"))
        figures = json.loads(report.read_text())["figures"]
        assert (row.nll, row.bits_per_byte) == (figures["loss"], figures["bits_per_byte"])
        assert row.token_accuracy == figures["top1_accuracy"]
        assert row.exact_accuracy is None
    found.render(Console(width=220))
    assert "exact" not in capsys.readouterr().out

    page = api.report(run).path.read_text()
    assert "<h2>Beside plain models</h2>" in page
    assert all(line in page for line in found.verdict)
    assert "against computation" in page
    again = api.compare(run=run)
    assert [row.run for row in again.rows] == [row.run for row in found.rows]
    plains = [row for row in found.rows if load_run(row.run).model.schedule == "once"]
    assert len(plains) == 2
    assert all(row.layers == load_run(row.run).model.num_hidden_layers for row in plains)


def test_a_report_says_what_is_not_compared_yet(tmp_path: Path, run: Path) -> None:
    alone = RunFolder(tmp_path / "run")
    alone.path.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (alone.path / name).write_bytes((run / name).read_bytes())
    made = api.report(alone.path)
    assert any("thimble compare --run" in line for line in made.missing)
    assert "Beside plain models" not in made.path.read_text()


def test_a_part_of_text_is_refused_before_anything_is_trained(run: Path) -> None:
    with pytest.raises(ConfigError, match="subset-size"):
        api.compare(run=run, subset_size=3)


def test_packed_chunks_are_refused_before_anything_is_trained(tmp_path: Path, run: Path) -> None:
    config = load_run(run)
    (tmp_path / "manifest.json").write_text('{"kind": "packed"}')
    packed = config.data.model_copy(update={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match="packed chunks"):
        compare.prepared(config.model_copy(update={"data": packed}))


def test_the_student_of_two_cores_is_compared_with_retnet_nano() -> None:
    mine = load("distill_nano", ["model=retnet_hrm"])
    plains = compare.plain_models(mine)
    nano = load("distill_nano").model
    same = plains[PARAMETERS]
    # What else it has is of recursion, and means nothing to a stack that runs once.
    for key in set(type(nano).model_fields) - RECURSIVE_KEYS:
        assert getattr(same, key) == getattr(nano, key), key
    assert same.num_parameters == nano.num_parameters
    assert plains[COMPUTATION].num_hidden_layers == 6


def test_a_student_that_halts_is_compared_with_one_that_is_taught_alike(tmp_path: Path) -> None:
    short = ("training.max_steps=2", "training.log_every=1", "training.eval_every=2")
    config = helpers_recursion.instruct(tmp_path, *helpers_distill.RETENTION, *short)
    found = api.compare(run=train(config).path)
    for row in found.rows[1:]:
        its = load_run(row.run)
        assert (its.model.mixer, its.model.schedule) == ("retention", "recursive")
        assert (its.objective, row.updates) == (config.objective, 2)


def test_positions_of_any_kind_have_a_plain_student() -> None:
    mine = load("distill_nano", ["model=retnet_hrm", "model.position_embedding=none"])
    for plain in compare.plain_models(mine).values():
        assert (plain.schedule, plain.position_embedding) == ("once", "rope")


def test_a_student_that_runs_once_has_no_recursion_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs its blocks once"):
        compare.prepared(helpers_training.config(tmp_path))
