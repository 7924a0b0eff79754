"""What is wrong with the data or the words of a recursive run, as one meets it on the command line.

Each message says what was wrong, where, and what to do; nothing half-done is left behind.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from tests import helpers_playbook as playbook
from tests.helpers_cli import Answer, Command
from tests.helpers_recursion import puzzle_directory
from tests.helpers_training import token_directory

TRAIN = ["train", "instruct_slimorca", *playbook.SMALL, "global_batch_size=8"]
FILE = "dataset.name=talk.jsonl"
PUZZLES = [
    *("arch.hidden_size=32", "model.intermediate_size=48", "arch.num_heads=2"),
    *("model.num_key_value_heads=2", "model.head_dim=16", "arch.H_cycles=1", "arch.L_cycles=1"),
    *("arch.halt_max_steps=2", "device=cpu", "logging.tensorboard=false", "training.max_steps=2"),
    *("global_batch_size=8", "model.puzzle_emb_len=2"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_TOKENIZER", "tokenizer.model")
    playbook.write_tokenizer(tmp_path / "tokenizer.model")
    playbook.write_lines(tmp_path / "talk.jsonl", playbook.slimorca_records(40))
    return tmp_path


@pytest.fixture
def command(place: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def refused(answer: Answer, status: int, *parts: str) -> None:
    """The status, one error with all these parts in it, no traceback, no run folder."""
    assert answer.status == status, answer.err
    assert answer.err.count("error: ") == 1
    message = answer.err.partition("error: ")[2]
    for part in parts:
        assert part in message, message
    assert "Traceback" not in answer.err
    assert not list(Path("runs").glob("*/*/checkpoints/*"))


# --- the tokenizer


def test_no_tokenizer(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_TOKENIZER")
    refused(command(*TRAIN, FILE), 2, "Which tokenizer?", "dataset.tokenizer_path=", "LLAMA_TOKEN")


@pytest.mark.parametrize("by", ["LLAMA_TOKENIZER", "dataset.tokenizer_path"])
def test_a_tokenizer_that_is_not_there(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    words = [f"{by}=gone.model"] if by.startswith("dataset") else []
    monkeypatch.setenv("LLAMA_TOKENIZER", "gone.model")
    refused(command(*TRAIN, FILE, *words), 5, str(place / "gone.model"), by, "Put it there")


def test_a_file_that_is_no_tokenizer(command: Command) -> None:
    refused(command(*TRAIN, FILE, "dataset.tokenizer_path=talk.jsonl"), 5, "talk.jsonl is not a")


def test_a_tokenizer_of_another_vocabulary(command: Command) -> None:
    answer = command(*TRAIN, FILE, "model.vocab_size=32000")
    refused(answer, 5, "tokenizer.model has 360 entries", "32,000", "\n  model.vocab_size=360")


def test_a_tokenizer_that_knows_too_little(command: Command, place: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["mount disk [SYSTEM] [USER] [ASSISTANT] abcdefghijklmno"] * 9),
        model_prefix="narrow",
        model_type="char",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    size = sentencepiece.SentencePieceProcessor(model_file="narrow.model").vocab_size()
    words = ["dataset.tokenizer_path=narrow.model", f"model.vocab_size={size}"]
    answer = command(*TRAIN, FILE, *words)
    refused(answer, 5, "of the tokens are unknown to the tokenizer narrow.model", "at most 0.1%")
    assert not list(place.glob("data/conversations/*-*"))


# --- the records


def test_broken_and_empty_records_are_named_by_line(command: Command, place: Path) -> None:
    good = playbook.slimorca_records(20)
    bad: list[Any] = ["{broken", {"conversations": []}, [1], "null"]
    playbook.write_lines(place / "talk.jsonl", [*good, *bad])
    answer = command(*TRAIN, FILE)
    refused(answer, 5, "talk.jsonl:21: not JSON", "cannot be read", "up to 1%", "Mend or remove")
    assert not list(place.glob("data/conversations/*-*"))


def test_a_few_of_them_are_left_out_and_said(command: Command, place: Path) -> None:
    good = playbook.slimorca_records(200)
    playbook.write_lines(place / "talk.jsonl", [*good, "{broken"])
    answer = command(*TRAIN, FILE)
    assert answer.status == 0, answer.err
    assert "talk.jsonl:201: not JSON" in answer.err
    manifest = json.loads(next(place.glob("data/conversations/*/manifest.json")).read_text())
    assert manifest["counts"]["refused"] == 1
    assert manifest["counts"]["examples"] == 200


def test_no_records_at_all(command: Command, place: Path) -> None:
    playbook.write_lines(place / "talk.jsonl", [])
    refused(command(*TRAIN, FILE), 5, "talk.jsonl holds no records")
    refused(command(*TRAIN, "dataset.name=gone.jsonl"), 5, "no such file or folder", "slimorca")


# --- their number and length


def test_a_subset_smaller_than_a_batch(command: Command) -> None:
    words = ["dataset.subset_size=6", "dataset.test_ratio=0", "dataset.val_ratio=0"]
    answer = command(*TRAIN, FILE, *words)
    refused(answer, 5, "No train batch", "6 conversations", "takes 8", "\n  global_batch_size=6")


def test_a_length_that_leaves_no_answer(command: Command) -> None:
    answer = command(*TRAIN, FILE, "dataset.seq_len=2")
    refused(answer, 5, "With seq_len=2 no answer is left", "dataset.seq_len=8")


def test_a_length_that_leaves_few_answers(command: Command) -> None:
    answer = command(*TRAIN, FILE, "dataset.seq_len=16", "global_batch_size=38")
    refused(answer, 5, "No train batch", "more are left out: dataset.seq_len=16 leaves them no")


# --- models


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["arch.causal=false"], "\n  model.causal=true"),
        (["arch.mlp_t=True"], "\n  model.mixer=attention"),
        (["arch.mlp_t=True", "arch.causal=false"], "\n  model.causal=true"),
    ],
)
def test_a_mixer_that_sees_the_answer(command: Command, words: list[str], said: str) -> None:
    refused(command(*TRAIN, FILE, *words), 2, "language model", "the words it is asked for", said)


@pytest.fixture
def run(command: Command) -> str:
    answer = command(*TRAIN, FILE, "--json")
    assert answer.status == 0, answer.err
    return json.loads(answer.out)["run"]


def test_a_checkpoint_that_does_not_fit(command: Command, run: str, place: Path) -> None:
    def said(answer: Answer, status: int, *parts: str) -> None:
        assert answer.status == status, answer.err
        assert answer.err.count("error: ") == 1
        for part in parts:
            assert part in answer.err.partition("error: ")[2], answer.err

    begin = [*TRAIN, FILE, f"load_checkpoint={run}"]
    said(command(*begin, "arch.L_cycles=2"), 5, "another model", "\n  model.L_cycles=1")
    said(command(*TRAIN, FILE, "load_checkpoint=talk.jsonl"), 5, "talk.jsonl")
    # As many words, and other ones.
    other = playbook.write_tokenizer(place / "other" / "tokenizer.model", reverse=True)
    answer = command(*begin, f"dataset.tokenizer_path={other}")
    said(answer, 5, "another tokenizer", f"dataset.tokenizer_path={run}")
    said(
        command("evaluate", run, "--tokenizer-path", str(other)),
        *(5, "not the tokenizer", "leave --tokenizer-path out"),
    )
    said(command("evaluate", run, "--seq-len", "500"), 2, "dataset.seq_len=64")
    answer = command("evaluate", run, "--overrides", f"data.path={token_directory()}")
    assert answer.status in (2, 5), answer.err
    said(command("evaluate", "data"), 5, "data", "not a checkpoint")
    said(command("generate", "data", "--message", "x"), 5, "not a checkpoint")
    said(command("generate", run), 2, "--message")
    empty = ["--overrides", "dataset.test_ratio=0"]
    said(command("evaluate", run, *empty), 5, "test split", "is empty", "dataset.test_ratio=0.2")


# --- puzzles


@pytest.fixture
def puzzles(place: Path) -> Path:
    return Path(shutil.copytree(puzzle_directory(), place / "puzzles"))


def change(path: Path, how: Any) -> None:
    array = np.load(path)
    np.save(path, how(array))


def wrong_value(array: np.ndarray) -> np.ndarray:
    array[5, 3] = 77
    return array


@pytest.mark.parametrize(
    ("name", "how", "parts"),
    [
        ("inputs", lambda a: a[:, :-1], ["all__inputs.npy has shape [60, 15]", "[60, 16]"]),
        ("labels", lambda a: a[:-1], ["all__labels.npy has shape [59, 16]"]),
        ("inputs", wrong_value, ["all__inputs.npy, row 5, has the value 77", "0 to "]),
        ("labels", wrong_value, ["all__labels.npy, row 5, has the value 77"]),
        ("puzzle_identifiers", lambda a: a + 9, ["all__puzzle_identifiers.npy, row 0", "value 9"]),
    ],
)
def test_puzzles_of_a_wrong_shape_or_alphabet(
    command: Command, puzzles: Path, name: str, how: Any, parts: list[str]
) -> None:
    change(puzzles / "train" / f"all__{name}.npy", how)
    answer = command("train", "puzzle_sudoku", f"data.path={puzzles}", *PUZZLES)
    refused(answer, 5, *parts, "Build the data set again:\n  thimble puzzles build")


def test_puzzles_that_are_not_there(command: Command) -> None:
    answer = command("train", "puzzle_sudoku", "data.path=gone", *PUZZLES)
    refused(answer, 5, "no puzzles at gone/train", "\n  thimble puzzles build")


def test_files_of_puzzles_that_are_wrong(command: Command, place: Path) -> None:
    for question, said in (("12.4", "81 cells, not 4"), ("z" * 81, "line 2: character 1")):
        (place / "csv").mkdir(exist_ok=True)
        for split in ("train", "test"):
            text = f"source,question,answer,rating\nx,{question},{question},0\n"
            (place / "csv" / f"{split}.csv").write_text(text)
        answer = command("puzzles", "build", "sudoku", "--from", "csv", "-o", "made")
        refused(answer, 5, "train.csv", said)
        assert not (place / "made").exists()


def test_data_of_another_kind(command: Command, run: str) -> None:
    talk = next(Path("data/conversations").glob("talk-*"))
    answer = command("train", "puzzle_sudoku", f"data.path={talk}", *PUZZLES)
    assert answer.status == 2
    assert "holds conversations" in answer.err
    answer = command(
        "train", "puzzle_sudoku", "model.causal=true", "model.puzzle_identifiers=0", *PUZZLES
    )
    assert answer.status == 2
    assert "holds puzzles" in answer.err
    answer = command(*TRAIN, "dataset.name=null", f"data.path={token_directory()}")
    assert answer.status == 5
    assert "holds tokens" in answer.err
