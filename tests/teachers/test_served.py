"""A served teacher says what a loaded one says, position by position, or why it does not."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.teachers.helpers import LENGTH, examples, make_teacher
from tests.teachers.server import TinyServer
from thimble.errors import ConfigError, DataError, EnvironmentProblem
from thimble.objectives.sparse_targets import SparseTargets
from thimble.teachers import Asked, served
from thimble.teachers.direct import open_direct
from thimble.teachers.fill import fill
from thimble.teachers.served import KEY, ServedTeacher

ASKED = Asked(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def server(folder: Path) -> Iterator[TinyServer]:
    with TinyServer(folder) as running:
        yield running


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr(served.time, "sleep", waits.append)
    return waits


def teacher_of(server: TinyServer, **options: Any) -> ServedTeacher:
    return ServedTeacher(server.url, examples(), ASKED, **options)


def ask(teacher: Any, *numbers: int, starts: Any = None) -> Any:
    return teacher.targets(numbers, torch.from_numpy(examples().rows(numbers).inputs), starts)


def direct(folder: Path) -> Any:
    device = torch.device("cpu")
    return open_direct(folder, examples(), ASKED, device=device, precision="float32")


def assert_same(mine: Any, theirs: Any) -> None:
    assert isinstance(mine, SparseTargets)
    assert torch.equal(mine.indices, theirs.indices)
    for one, other in zip(mine.at(1.0), theirs.at(1.0), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_served_targets_are_the_direct_ones_at_every_position(
    server: TinyServer, folder: Path
) -> None:
    numbers = (3, 0, 9, 4, 5)
    assert_same(ask(teacher_of(server), *numbers), ask(direct(folder), *numbers))
    sent = [body for path, body, _ in server.requests if path == "/v1/completions"]
    assert {len(body["prompt"]) for body in sent} == {LENGTH + 1}
    assert len(sent) == len(numbers)


def test_documents_are_asked_alone(server: TinyServer, folder: Path) -> None:
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, 4] = starts[0, 0] = starts[1, LENGTH - 1] = True
    mine = ask(teacher_of(server), 0, 1, starts=starts)
    assert_same(mine, ask(direct(folder), 0, 1, starts=starts))


def test_a_cache_is_filled_from_a_server(server: TinyServer, folder: Path, tmp_path: Path) -> None:
    rows = examples("val")
    teacher = ServedTeacher(server.url, rows, ASKED)
    assert fill(tmp_path / "c", rows, teacher).rows == rows.count


def test_what_may_pass_is_tried_again_and_no_more_often_than_said(
    server: TinyServer, folder: Path, slept: list[float]
) -> None:
    teacher = teacher_of(server)
    server.failures = [(503, {}), (429, {"Retry-After": "7"}), (500, {"Retry-After": "9999"})]
    assert_same(ask(teacher, 2), ask(direct(folder), 2))
    assert slept == [0.5, 7.0, served.LONGEST_WAIT]
    server.failures = [(503, {})] * 9
    with pytest.raises(EnvironmentProblem, match=r"refused \(503\): not now"):
        ask(teacher, 2)
    assert len(server.failures) == 9 - 5
    slept.clear()
    server.failures = [(400, {})]
    with pytest.raises(EnvironmentProblem, match=r"refused \(400\)"):
        ask(teacher, 2)
    assert not slept


def test_a_server_that_is_away_or_slow_is_said(
    server: TinyServer, slept: list[float], folder: Path
) -> None:
    teacher = teacher_of(server, retries=1)
    teacher.server.timeout = 0.2
    with TinyServer(folder) as other:
        away = other.url
    with pytest.raises(EnvironmentProblem, match=r"cannot be reached(.|\n)*2 attempts"):
        ServedTeacher(away, examples(), ASKED, retries=1)
    complete, wait = server.complete, threading.Event()

    def slow(body: dict[str, Any]) -> Any:
        wait.wait(1.0)
        return complete(body)

    server.complete = slow  # type: ignore[method-assign]
    with pytest.raises(EnvironmentProblem, match=r"did not answer within 0\.2 s(.|\n)*2 attempts"):
        ask(teacher, 0)
    wait.set()


def shifted(path: str, answer: Any) -> Any:
    """As if row i were about token i + 1."""
    answer = copy.deepcopy(answer)
    if "choices" in answer:
        rows = answer["choices"][0]["prompt_logprobs"]
        rows[1:] = [*rows[2:], rows[1]]
    return answer


def entry(change: Any) -> Any:
    """A change of the last row of prompt_logprobs."""

    def changed(path: str, answer: Any) -> Any:
        answer = copy.deepcopy(answer)
        if "choices" in answer:
            rows = answer["choices"][0]["prompt_logprobs"]
            rows[-1] = change(rows[-1])
        return answer

    return changed


def set_first(value: float) -> Any:
    return entry(lambda row: {key: {"logprob": value} for key in row})


def choice(**values: Any) -> Any:
    def changed(path: str, answer: Any) -> Any:
        if "choices" in answer:
            answer["choices"][0].update(values)
        return answer

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, "it is shifted"),
        (entry(lambda row: dict(list(row.items())[:3])), "tokens a position, 8 were asked for"),
        (entry(lambda row: {**row, "99999": {"logprob": -0.001}}), "names token 99999"),
        (entry(lambda row: None), "where log probabilities should be"),
        (entry(lambda row: {**row, "word": {"logprob": 0}}), "where log probabilities should be"),
        (set_first(math.nan), "no log probabilities"),
        (set_first(3.0), "no log probabilities"),
        (set_first(1000.0), "no log probabilities"),
        (choice(prompt_logprobs=None), "has no prompt_logprobs"),
        (choice(prompt_token_ids=[1, 2]), "add or cut tokens"),
        (lambda path, answer: [], "has no prompt_logprobs"),
        (lambda path, answer: b"<html>", "did not answer with JSON"),
        (lambda path, answer: b" " * (1 << 21), "more than"),
    ],
)
def test_a_wrong_answer_is_refused(server: TinyServer, change: Any, message: str) -> None:
    teacher = teacher_of(server)
    server.change = change
    with pytest.raises(DataError, match=message):
        ask(teacher, 0)


def test_what_the_server_lacks_is_said_with_what_to_do(
    server: TinyServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EnvironmentProblem, match="--max-logprobs"):
        ask(ServedTeacher(server.url, examples(), Asked(30)), 0)
    with pytest.raises(EnvironmentProblem, match="serves tiny, not large"):
        teacher_of(server, model="large")
    server.max_model_len = LENGTH
    with pytest.raises(DataError, match="--max-model-len 14"):
        teacher_of(server)
    server.max_model_len = 64
    server.change = lambda path, answer: (401, {"error": {"message": "no"}})
    with pytest.raises(EnvironmentProblem, match=KEY):
        teacher_of(server)
    server.change = lambda path, answer: answer
    monkeypatch.setenv(KEY, "secret")
    ask(teacher_of(server), 0)
    assert server.requests[-1][2]["Authorization"] == "Bearer secret"


def test_another_vocabulary_is_refused(
    server: TinyServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.change = lambda path, answer: {"tokens": [1, 2]} if path == "/tokenize" else answer
    with pytest.raises(DataError, match="another vocabulary"):
        teacher_of(server)
    server.change = lambda path, answer: (404, {}) if path == "/tokenize" else answer
    teacher_of(server, retries=0)
    assert "for you to know" in caplog.text


def test_a_redirect_is_not_followed(server: TinyServer) -> None:
    teacher = teacher_of(server)
    server.failures = [(307, {"Location": f"{server.url}/v1/completions"})]
    with pytest.raises(EnvironmentProblem, match="307"):
        ask(teacher, 0)


@pytest.mark.parametrize("url", ["http://example.com:8000", "ftp://localhost", "localhost:8000"])
def test_addresses_that_are_none_or_not_safe_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        ServedTeacher(url, examples(), ASKED)


@pytest.mark.parametrize("asked", [Asked(8, (2.0,)), Asked(8, (1.0,), sampled=True)])
def test_what_a_server_cannot_tell_is_refused(server: TinyServer, asked: Asked) -> None:
    with pytest.raises(ConfigError, match="temperature 1 only"):
        ServedTeacher(server.url, examples(), asked)
