"""The verbs of ``thimble teacher`` as a person calls them, and what they say when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers_cli import Command
from tests.helpers_training import token_directory
from tests.teachers.helpers import LENGTH, examples, make_teacher
from tests.teachers.server import TinyServer
from thimble.teachers import Asked
from thimble.teachers.cache import CachedTeacher

ROWS = ("--sequence-length", str(LENGTH))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def test_a_teacher_is_tuned_and_its_words_are_kept(
    run: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    words = (str(folder), token_directory(), *ROWS, "--device", "cpu", "--json")
    small = ("--rank", "4", "--max-steps", "2", "--learning-rate", "0.01")
    answer = run("teacher", "finetune", *words, *small, "-o", "tuned")
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["steps"] == 2
    assert run("teacher", "finetune", *words, *small, "-o", "tuned").status == 2
    assert run("teacher", "finetune", *words, *small, "-o", "tuned", "--resume").status == 0

    asked = ("--topk", "4", "--temperatures", "1,2", "--adapter", "tuned/adapter")
    for expected in (examples().count, 0):  # the second time nothing is asked
        answer = run("teacher", "cache", *words, *asked)
        assert answer.status == 0, answer.err
        assert json.loads(answer.out)["asked_now"] == expected
    (made,) = Path("data/teacher_cache").iterdir()
    CachedTeacher(made, examples(), Asked(4, (2.0, 1.0)))
    assert json.loads(run("inspect", str(made), "--json").out)["kind"] == "teacher-cache"
    merged = run("generate", "tuned/merged", "--prompt", "the", "--max-tokens", "3")
    assert merged.status == 0, merged.err


def test_a_server_is_a_teacher_by_its_address(run: Command, folder: Path, tmp_path: Path) -> None:
    with TinyServer(folder) as server:
        words = (server.url, token_directory(), *ROWS, "--split", "val", "--topk", "4")
        answer = run("teacher", "cache", *words, "-o", str(tmp_path / "c"))
        assert answer.status == 0, answer.err
        assert run("teacher", "cache", *words, "--ram-disk").status == 2
    assert CachedTeacher(tmp_path / "c", examples("val"), Asked(4)).identity["served"] == "tiny"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, "--sequence-length N"),
        ((*ROWS, "--temperatures", "warm"), 2, "give numbers"),
        ((*ROWS, "--temperatures", "1,2", "--samples", "4"), 2, "one temperature"),
        ((*ROWS, "--topk", "99999"), 2, "99999 likeliest"),
        ((*ROWS, "--served-model", "x"), 2, "for a server"),
        (("--sequence-length", "65"), 5, "reads at most 64"),
        ((*ROWS, "--split", "all"), 5, "no split"),
    ],
)
def test_what_cannot_be_is_said(
    run: Command,
    folder: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    output = ("-o", str(tmp_path / "c"))
    answer = run("teacher", "cache", str(folder), token_directory(), *words, *output)
    assert answer.status == status
    assert message in answer.err
    assert not (tmp_path / "c").exists()
