"""A student on held-out rows beside its teacher, and what a context costs both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import helpers_training
from tests.helpers_cli import Command
from tests.helpers_distill import config, packed_in, teacher_in
from tests.helpers_evaluation import best
from tests.teachers.server import TinyServer
from thimble import api
from thimble.artifacts import read_json, write_json
from thimble.config.load import load_run
from thimble.errors import ConfigError, DataError
from thimble.evaluation import evaluate as module
from thimble.evaluation.acceptance import accept
from thimble.evaluation.context import measure
from thimble.evaluation.evaluate import Evaluation
from thimble.evaluation.reading import StudentReader, TeacherReader, answer, prompt
from thimble.export.model_card import model_card
from thimble.teachers.models import load as load_teacher
from thimble.tokens.packing import pack
from thimble.training import train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_in(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["evaluation.max_tokens=null", "training.eval_every=12", "training.save_every=12"]
    return train(config(tmp_path_factory.mktemp("runs"), teacher, *words)).path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEXTS", 2)
    monkeypatch.setattr(module.speed, "REPEATS", 1)
    monkeypatch.setattr(module.context, "NEW_TOKENS", 3)


def evaluated(*paths: Any, **options: Any) -> Evaluation:
    found = api.evaluate(*paths, device="cpu", **options)
    assert isinstance(found, Evaluation)
    return found


def test_it_says_what_training_said_of_the_same_rows(student: Path, teacher: Path, capfd) -> None:
    records = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "val_teacher_kl" in record][-1]
    found = evaluated(student, split="val")
    assert found.teacher == str(teacher)
    for name in ("loss", "bits_per_byte", "teacher_kl", "teacher_agreement", "calibration_error"):
        assert found.figures[name] == pytest.approx(last[f"val_{name}"], rel=1e-4), name
    # The teacher against itself, and its loss as a model of its own.
    itself = evaluated(teacher, split="val", tokens=helpers_training.token_directory(),
                       teacher=teacher)  # fmt: skip
    # It is asked in the precision of the machine, which may be bfloat16.
    assert itself.figures["teacher_kl"] == pytest.approx(0, abs=1e-3)
    assert itself.figures["teacher_agreement"] > 0.95
    theirs, own = itself.figures["teacher_perplexity"], itself.figures["perplexity"]
    assert theirs == pytest.approx(own, rel=1e-2)
    assert theirs != pytest.approx(found.figures["perplexity"], rel=1e-2)
    command = Command(capfd)("evaluate", str(student), "--split", "val", "--device", "cpu",
                             "--context", "--lengths", "8,32")  # fmt: skip
    assert command.status == 0, command.err
    assert "beside the teacher" in command.out
    assert "student after" in command.out
    kept = read_json(best(student) / "evaluation_report.json")["context"]
    assert kept["lengths"] == [8, 32]
    assert set(kept["models"]) == {"student", "teacher"}


def test_a_teacher_that_cannot_be_asked_is_told_of(
    student: Path, teacher: Path, tmp_path: Path
) -> None:
    about = best(student) / "teacher.json"
    known = read_json(about)
    write_json(about, {**known, "identity": {"weights": "another", "adapter": None}})
    try:
        found = evaluated(student, split="val")
    finally:
        write_json(about, known)
    assert found.teacher is None
    assert "teacher_kl" not in found.figures
    assert any("not the one it learned from" in note for note in found.notes)
    with pytest.raises(DataError, match="no model at"):
        evaluated(student, split="val", teacher=tmp_path / "gone")
    with pytest.raises(ConfigError, match="--needle, --context"):
        evaluated(student, lengths=[8])


def test_a_server_is_a_teacher_by_its_address(student: Path, teacher: Path) -> None:
    with TinyServer(teacher) as server:
        served = evaluated(student, split="val", teacher=server.url)
        named = evaluated(student, split="val", teacher=teacher)
    assert served.teacher == server.url
    for name in ("teacher_kl", "teacher_agreement"):
        assert served.figures[name] == pytest.approx(named.figures[name], rel=2e-2), name


def test_another_folder_that_training_was_judged_by(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it that is not trained on counts, whether it is named or not."""
    monkeypatch.chdir(tmp_path)
    mine, words = packed_in(tmp_path), ["training.max_steps=4", "evaluation.max_tokens=null"]
    lines = (tmp_path / "in/a.jsonl").read_text().splitlines(keepends=True)
    Path("b.jsonl").write_text("".join([*lines[:20], '{"text": "the kernel loads a disk"}\n' * 9]))
    options: dict[str, Any] = {"tokenizer": helpers_training.token_directory(), "val_ratio": 0}
    pack(Path("b.jsonl"), Path("b"), workers=1, max_seq_length=helpers_training.WINDOW, **options)
    run = train(config(tmp_path, teacher, *words, f"data.path={mine}", "data.val_path=b"))
    last = [record for record in run.metrics if "val_teacher_kl" in record][-1]
    trained_on: list[Path] = []
    known = lambda model, text: trained_on.append(text.directory) or frozenset()  # noqa: E731
    monkeypatch.setattr(module, "known_words", known)
    for options in ({}, {"tokens": "b"}, {"tokens": tmp_path / "b"}):
        found = evaluated(run.path, **options)
        assert (found.tokens, found.split) == (tmp_path / "b", "val")
        for name in ("loss", "tokens", "teacher_kl", "teacher_agreement"):
            assert found.figures[name] == pytest.approx(last[f"val_{name}"], rel=1e-4), name
        assert found.figures["documents"] == 4  # of 21
        assert any("judged by" in note for note in found.notes)
        assert not any("not known here" in note for note in found.notes)
    assert trained_on == [mine] * 3
    other = evaluated(run.path, tokens=mine)
    assert other.figures["tokens"] != found.figures["tokens"]
    assert any("not known here" in note for note in other.notes)
    result = accept(run.path)
    assert result.evaluation["tokens"] == last["val_tokens"]
    ratios = re.findall(r"tokens pack .* --val-ratio (\S+)", model_card(result, load_run(run.path)))
    assert ratios == ["0.2", "0"]


# ------------------------------------------------------------------------------ reading and costs


@pytest.fixture(scope="module")
def both(student: Path, teacher: Path) -> dict[str, Any]:
    loaded = load_teacher(teacher, device=torch.device("cpu"), dtype=torch.float32)
    return {"student": StudentReader(api.load(student, "cpu")), "teacher": TeacherReader(loaded)}


def logits_of(reader: Any, ids: torch.Tensor) -> torch.Tensor:
    if isinstance(reader, StudentReader):
        return reader.network(ids)
    return reader.loaded.model(ids).logits


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_reading_on_is_reading_at_once(
    who: str, both: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = both[who]
    ids = torch.randint(0, 250, (3, 30), generator=torch.Generator().manual_seed(0))
    right = ids[:, 27:]
    with torch.no_grad():
        whole = logits_of(reader, ids).float()
    monkeypatch.setattr("thimble.evaluation.reading.BATCH_TOKENS", 3 * 7)  # in pieces of seven
    found = answer(reader, ids[:, :27], right)
    torch.testing.assert_close(found.first, whole[:, 26], rtol=1e-4, atol=1e-4)
    said = whole[:, 26:29].log_softmax(-1).gather(2, right[..., None])[..., 0]
    torch.testing.assert_close(found.nats, -said.sum(1), rtol=1e-4, atol=1e-4)
    # What is generated is the likeliest, of the text with what was generated before.
    row = ids[:, :27]
    for place in range(3):
        with torch.no_grad():
            chosen = logits_of(reader, row)[:, -1].argmax(-1)
        assert torch.equal(found.generated[:, place], chosen)
        row = torch.cat([row, chosen[:, None]], dim=1)


def test_retention_keeps_as_much_for_any_context_and_attention_more(both: dict[str, Any]) -> None:
    found = measure(both, 250, [8, 32, 128])["models"]
    (kept,) = {row["state_bytes"] for row in found["student"]["rows"]}
    with torch.inference_mode():
        state = both["student"].begin(1, 8)
        prompt(both["student"], torch.zeros(1, 8, dtype=torch.long), state)
    assert kept == sum(layer.memory.numel() * 4 for layer in state)
    # Keys and values of two layers, two heads of eight channels, in float32.
    expected = [2 * 2 * 2 * 8 * 4 * length for length in (8, 32, 128)]
    assert [row["state_bytes"] for row in found["teacher"]["rows"]] == expected
    assert [row["beyond"] for row in found["teacher"]["rows"]] == [False, False, True]
    assert not any(row["beyond"] for row in found["student"]["rows"])
    for each in found.values():
        assert all(row["decode_tokens_per_second"] > 0 for row in each["rows"])
