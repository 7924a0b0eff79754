"""``thimble evaluate RUN --needle`` on checkpoints: of a corpus, of packed chunks, recursive."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest

from tests.helpers_cli import Command
from tests.helpers_distill import RECURSIVE, config, teacher_in
from tests.helpers_evaluation import best
from tests.helpers_training import WINDOW, token_directory
from thimble.artifacts import read_json
from thimble.evaluation import evaluate, needle
from thimble.tokens.packing import pack
from thimble.training import train

SHORT = ["training.max_steps=2", "training.eval_every=2", "training.save_every=2"]
WORDS = ["kernel", "driver", "module", "device", "disk", "loads", "mounts", "the", "a"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "TEXTS", 2)
    monkeypatch.setattr(evaluate.speed, "REPEATS", 1)
    monkeypatch.setattr(needle, "search", functools.partial(needle.search, trials_each=2))


def packed_in(folder: Path) -> Path:
    """Chunks of text that has words enough for needles."""
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=40))}) + "\n" for _ in range(60)]
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl").write_text("".join(lines))
    settings = {"tokenizer": token_directory(), "max_seq_length": WINDOW, "val_ratio": 0.3}
    pack(folder / "in", folder / "packed", workers=1, **settings)
    return folder / "packed"


@pytest.mark.parametrize("kind", ["corpus", "packed", "recursive"])
def test_needles_of_a_checkpoint(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.path={packed_in(tmp_path)}"] if kind == "packed" else []
    words += RECURSIVE if kind == "recursive" else []
    # With a teacher, who has 128 positions and is not asked beyond; and without one.
    teacher = None if kind == "packed" else teacher_in(tmp_path, max_position_embeddings=128)
    run = train(config(tmp_path / "runs", teacher, *SHORT, *words)).path
    line = ["evaluate", str(run), "--needle", "--split", "val", "--device", "cpu"]
    answer = Command(capfd)(*line, "--lengths", "80,160")
    assert answer.status == 0, answer.err
    assert "needles found, by depth" in answer.out
    found = read_json(best(run) / "evaluation_report.json")["needle"]
    assert (found["lengths"], found["trials"]) == ([80, 160], 2)
    readers = {name: {c["length"] for c in m["cells"]} for name, m in found["models"].items()}
    told = {} if teacher is None else {"teacher": {80}}
    assert readers == {"student": {80, 160}, **told}
    for model in found["models"].values():
        for cell in model["cells"]:
            assert cell["depth"] in found["depths"]
            assert 0 <= cell["accuracy"] <= 1
            assert 0 <= cell["choice"] <= 1
            right, said = cell["first"]
            assert set(right.split()) <= set(WORDS)
            assert said


def test_without_lengths_there_is_one_for_which_there_is_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(config(tmp_path / "runs", None, *SHORT)).path
    line = ["evaluate", str(run), "--needle", "--split", "val", "--device", "cpu", "--json"]
    answer = Command(capfd)(*line)
    assert answer.status == 0, answer.err
    (length,) = json.loads(answer.out)["needle"]["lengths"]
    assert length > 4 * WINDOW
