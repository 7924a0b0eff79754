"""A student learns from a teacher: nothing from itself, the same after a resume, from a cache as
from the teacher, and nothing of the teacher is trained or saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import helpers_distill, helpers_training
from tests.helpers_distill import RECURSIVE, config
from tests.helpers_training import state_of, timeless, token_directory, trainer
from thimble.config.load import load_run
from thimble.config.schema import ObjectiveConfig
from thimble.errors import ConfigError, DataError
from thimble.evaluation import agreement
from thimble.objectives.distillation import blend, temperatures
from thimble.objectives.linear_cross_entropy import token_scores
from thimble.objectives.sparse_targets import likeliest
from thimble.teachers import WindowExamples
from thimble.teachers.direct import DirectTeacher
from thimble.teachers.fill import fill
from thimble.training import checkpoint, train
from thimble.training.distillation import asked_of, open_teacher
from thimble.training.run import RunFolder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers_distill.teacher_in(tmp_path_factory.mktemp("teacher"))


def records(run: Any, key: str) -> list[Any]:
    return [record[key] for record in run.metrics if key in record]


STUDENTS = [
    pytest.param([], id="retention"),
    pytest.param(RECURSIVE, id="recursive retention"),
    pytest.param(["teacher.sampled=true"], id="draws"),
    pytest.param(
        ["objective.temperature_start=4", "objective.distill_alpha_start=0.9"], id="schedules"
    ),
    pytest.param(
        ["objective.divergence=reverse", "objective.reverse_warmup_steps=5"], id="reverse"
    ),
]


@pytest.mark.parametrize("settings", STUDENTS)
def test_resumed_equals_uninterrupted(
    settings: list[str], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Saved in the middle of a record, so that its sums must be in the checkpoint.
    chosen = config(tmp_path, teacher, *settings, "training.save_every=5", "training.log_every=3")
    whole = train(chosen)
    folder = tmp_path / "stopped"
    shutil.copytree(whole.path, folder)
    for path in sorted((folder / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    again = train(chosen, resume=folder)
    assert again.latest is not None
    assert whole.latest is not None
    assert state_of(again.latest) == state_of(whole.latest)
    assert timeless(folder) == timeless(whole.path)


def test_a_student_has_nothing_to_learn_from_itself(tmp_path: Path) -> None:
    """At every temperature, in both directions, and with draws on average."""
    itself = train(helpers_training.config(tmp_path / "itself")).path
    for settings in (
        ["objective.temperature=1"],
        ["objective.temperature=3"],
        ["objective.temperature=2", "objective.divergence=reverse"],
    ):
        run = train(
            helpers_training.config(
                tmp_path,
                "objective.name=distill",
                "objective.distill_alpha=0",
                f"teacher.path={itself}",
                f"training.load_checkpoint={itself}",
                "training.max_steps=2",
                "training.log_every=1",
                "optim.name=adamw",
                "optim.learning_rate=1e-9",
                *settings,
            )
        )
        assert max(map(abs, records(run, "kl"))) < 1e-5
        assert max(records(run, "grad_norm")) < 1e-3
        assert records(run, "val_teacher_kl")[-1] == pytest.approx(0, abs=1e-5)
        assert records(run, "val_teacher_agreement")[-1] == 1


def test_the_loss_is_its_parts(teacher: Path, tmp_path: Path) -> None:
    run = train(config(tmp_path, teacher, "objective.temperature=3", "training.log_every=1"))
    for record in run.metrics:
        if "kl" in record:
            alpha = record["alpha"]
            expected = alpha * record["ce"] + (1 - alpha) * 9 * record["kl"]
            assert record["loss"] == pytest.approx(expected, rel=1e-5)


def test_it_comes_nearer_to_its_teacher(teacher: Path, tmp_path: Path) -> None:
    words = ["training.max_steps=60", "training.eval_every=5", "objective.distill_alpha=0"]
    near = train(config(tmp_path, teacher, *words, "objective.temperature=1"))
    divergences = records(near, "val_teacher_kl")
    assert divergences[-1] < 0.9 * divergences[0]


@pytest.mark.parametrize("sampled", [False, True])
def test_from_a_cache_as_from_the_teacher(sampled: bool, teacher: Path, tmp_path: Path) -> None:
    words = [f"teacher.sampled={str(sampled).lower()}", "training.log_every=1"]
    direct = train(config(tmp_path, teacher, *words))
    chosen = config(tmp_path, teacher, *words, "teacher.mode=cached", "teacher.cache=unused")
    examples = WindowExamples(token_directory(), "train", helpers_training.WINDOW)
    asked_now = open_teacher(config(tmp_path, teacher, *words), examples, torch.device("cpu"))
    fill(tmp_path / "cache", examples, asked_now)
    options = chosen.teacher.model_copy(update={"cache": str(tmp_path / "cache")})
    cached = train(chosen.model_copy(update={"teacher": options}))
    for key in ("loss", "ce", "kl", "val_teacher_kl"):
        # float16 keeps log probabilities to 2^-11 of themselves.
        assert records(cached, key) == pytest.approx(records(direct, key), rel=2e-3, abs=2e-3), key
    assert asked_of(chosen).temperatures == (2.0,)


def test_a_direct_run_fills_a_cache_that_the_next_one_reads(teacher: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = [f"teacher.cache={cache}", "training.max_steps=50", "training.log_every=50"]
    first = train(config(tmp_path, teacher, *words, "teacher.cache_logits=true"))
    again = train(config(tmp_path, None, *words, "objective.name=distill", "teacher.mode=cached"))
    # Without its name the teacher cannot be asked about what is held out.
    assert records(first, "val_teacher_kl")
    assert not records(again, "val_teacher_kl")
    assert records(again, "kl") == pytest.approx(records(first, "kl"), rel=5e-3)
    other = helpers_distill.teacher_in(tmp_path, seed=5)
    with pytest.raises(DataError, match="another teacher"):
        train(config(tmp_path, other, *words, "teacher.mode=cached"))


def test_nothing_of_the_teacher_is_trained_or_saved(teacher: Path, tmp_path: Path) -> None:
    chosen = config(tmp_path, teacher)
    run = trainer(chosen)
    taught: DirectTeacher = run.task.teacher  # type: ignore[attr-defined]
    before = {n: p.clone() for n, p in taught.loaded.model.named_parameters()}
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in taught.loaded.model.parameters()}
    run.step()
    for name, parameter in taught.loaded.model.named_parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
        assert torch.equal(parameter, before[name])
    finished = train(chosen)
    assert finished.latest is not None
    assert set(load_file(finished.latest / "model.safetensors")) == {
        name for name in run.model.state_dict() if name != "head.weight"
    }
    assert json.loads((finished.latest / "teacher.json").read_text())["identity"]["weights"]


# --- from the next token to a teacher


def test_pretraining_goes_on_with_a_teacher(teacher: Path, tmp_path: Path) -> None:
    """Weights, moments and place are those of the pretraining; the records say what happened."""
    first = train(config(tmp_path, None, "training.max_steps=6", "training.save_every=6"))
    assert first.latest is not None
    before = state_of(first.latest)
    chosen = config(tmp_path, teacher, "training.max_steps=12", "optim.learning_rate=0.002")
    resumed = trainer(chosen)
    folder = RunFolder(first.path)
    copy = tmp_path / "copy"
    shutil.copytree(first.path, copy)
    resumed.resume(folder, first.path)
    assert resumed.state.step == 6
    assert resumed.state.windows == 6 * resumed.task.batch_size
    for name, tensor in load_file(first.latest / "model.safetensors").items():
        assert torch.equal(resumed.model.state_dict()[name], tensor)
    run = train(chosen, resume=copy)
    assert run.step == 12
    (event,) = [r for r in run.metrics if r.get("event") == "objective"]
    assert (event["from"], event["to"], event["step"]) == ("next_token", "distill", 6)
    assert event["teacher.json"]["path"] == str(teacher)
    assert [r["step"] for r in run.metrics if "kl" in r] == [9, 12]
    assert [r["step"] for r in run.metrics if "loss" in r and "kl" not in r] == [3, 6]
    # The rate given on resume is the one used: the schedule's last step is a tenth of it.
    assert records(run, "learning_rate")[-1] == pytest.approx(0.0002)
    # Whoever resumes it again goes on with the teacher.
    assert load_run(copy).objective.name == "distill"
    assert (copy / event["former_config"]).is_file()
    assert before == state_of(first.latest)


def test_back_to_the_next_token(teacher: Path, tmp_path: Path) -> None:
    first = train(config(tmp_path, teacher, "training.max_steps=4"))
    run = train(config(tmp_path, None, "training.max_steps=8"), resume=first.path)
    assert [r["to"] for r in run.metrics if r.get("event") == "objective"] == ["next_token"]


def test_another_student_is_refused(teacher: Path, tmp_path: Path) -> None:
    first = train(config(tmp_path, None, "training.max_steps=4"))
    other = config(tmp_path, teacher, "model.num_hidden_layers=2", "training.max_steps=8")
    with pytest.raises(DataError, match="another model"):
        train(other, resume=first.path)


# --- schedules and bad input


def test_schedules_begin_and_end_where_they_are_said_to() -> None:
    options = ObjectiveConfig(
        name="distill",
        distill_alpha=0.2,
        distill_alpha_start=1.0,
        temperature=1.0,
        temperature_start=2.5,
        temperature_warmup_steps=50,
        divergence="reverse",
        reverse_warmup_steps=10,
    )
    steps = [blend(options, step, 100) for step in range(100)]
    assert steps[0] == (1.0, 2.5, False)
    assert steps[-1] == (pytest.approx(0.2), 1.0, True)
    assert [b.reverse for b in steps].index(True) == 10
    assert {b.temperature for b in steps} == set(temperatures(options))
    falling = [b.temperature for b in steps]
    assert falling == sorted(falling, reverse=True)
    assert steps[49].temperature == 1.0
    alphas = [b.alpha for b in steps]
    assert alphas == sorted(alphas, reverse=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "teacher.path="),
        (["teacher.mode=cached"], "teacher.cache="),
        (["teacher.mode=served"], "teacher.url="),
        (["teacher.mode=served", "teacher.url=http://localhost:1"], "objective.temperature=1"),
        (["teacher.path=x", "teacher.cache_logits=true"], "teacher.cache="),
        (
            ["teacher.path=x", "teacher.sampled=true", "objective.divergence=reverse"],
            "objective.divergence=forward",
        ),
        (
            ["teacher.path=x", "teacher.sampled=true", "objective.temperature_start=3"],
            "teacher.sampled=false",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    words: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, None, "objective.name=distill", *words)


def test_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model at"):
        train(config(tmp_path, tmp_path / "nobody"))
    assert not (tmp_path / "slm_nano").exists()  # no run of it


# --- likeness and calibration


def test_likeness_and_calibration_against_the_plain_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 50, 8, generator=generator)
    student = torch.randn(30, 8, generator=generator)
    teacher = torch.randn(30, 8, generator=generator)
    targets = torch.randint(0, 30, (3, 50), generator=generator)
    targets[0, :7] = -100
    said = likeliest(hidden, teacher, 29)
    scores = agreement.position_scores(hidden, student, targets, said)
    torch.testing.assert_close(scores[..., :3], token_scores(hidden, student, targets))
    counted = targets != -100
    q = (hidden @ student.t())[counted].log_softmax(-1)
    p = (hidden @ teacher.t())[counted].log_softmax(-1)
    names = ["ce", *agreement.names(teacher=True)]
    means = dict(zip(names, (scores.sum((0, 1)) / counted.sum()).tolist(), strict=True))
    # With all tokens but one told apart nothing is lost.
    assert means["teacher_kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert means["teacher_agreement"] == pytest.approx(same)
    assert means["ce"] == pytest.approx(
        torch.nn.functional.nll_loss(q, targets[counted]).item(), rel=1e-5
    )
    sure, choice = q.exp().max(-1)
    right = (choice == targets[counted]).float()
    error = 0.0
    for low in range(10):
        inside = (sure * 10).long().clamp(max=9) == low
        error += abs((sure - right)[inside].sum().item()) / len(sure)
    assert agreement.calibration_error(means) == pytest.approx(error, rel=1e-4)


def test_checkpoint_says_what_it_is_of(teacher: Path, tmp_path: Path) -> None:
    run = train(config(tmp_path, teacher, "training.max_steps=4"))
    assert run.latest is not None
    assert checkpoint.problems(run.latest) == []
