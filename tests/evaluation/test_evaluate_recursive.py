"""``thimble evaluate`` of recursive checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import helpers_recursive as small
from tests.helpers_cli import Command
from tests.puzzles import arc_files
from thimble import api
from thimble.artifacts import read_json, write_json
from thimble.config.load import load_run
from thimble.conversations.dataset import Conversations
from thimble.errors import ConfigError, DataError, ThimbleError
from thimble.evaluation.evaluate_recursive import RecursiveEvaluation
from thimble.evaluation.recursive import evaluate_conversations
from thimble.evaluation.tables import tables
from thimble.models import interop
from thimble.puzzles import arc, voting
from thimble.puzzles.loader import Split

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return small.conversation_checkpoint(tmp_path)


def data_of(checkpoint: Path) -> Conversations:
    return Conversations(load_run(checkpoint).data.folder)


def evaluate(checkpoint: Path, **options: Any) -> RecursiveEvaluation:
    result = api.evaluate(checkpoint, device="cpu", **options)
    assert isinstance(result, RecursiveEvaluation)
    return result


def change(file: Path, **values: Any) -> None:
    write_json(file, read_json(file) | values)


# -------------------------------------------------------------------------------- conversations


def test_the_block_of_the_documents_and_the_report(checkpoint: Path, capfd) -> None:
    words = ["evaluate", "--checkpoint", str(checkpoint), "--split", "test", "--device", "cpu"]
    answer = Command(capfd)(*words, "--save-outputs", "preds", "labels", "--subset-size", "9")
    assert answer.status == 0, answer.err
    lines = answer.out.splitlines()
    report = read_json(checkpoint / "evaluation_report.json")
    assert lines[:2] == ["=== Inference Metrics ===", "test:"]
    names = ["accuracy", "exact_accuracy", "lm_loss", "q_halt_accuracy", "q_halt_loss", "steps"]
    for name, line in zip(names, lines[2:8], strict=True):
        assert line == f"  {name}: {float(report['figures'][name])!r}"
    assert lines[7] == "  steps: 3.0"
    for word in ("supervision step", "where it halts", "bigram", "unigram", "bits/byte"):
        assert word in answer.out
    kept = load_file(checkpoint / "outputs-test.safetensors")
    assert f"outputs: {checkpoint / 'outputs-test.safetensors'}" in answer.out
    assert set(kept) == {"examples", "preds", "labels"}
    assert len(kept["preds"]) == report["figures"]["examples"] == 9
    assert report["step"] == 7
    assert report["kind"] == "conversations"
    expected = evaluate_conversations(
        interop.load_model(checkpoint),  # type: ignore[arg-type]
        data_of(checkpoint),
        "test",
        form="softmax",
        max_examples=9,
        batch_size=2,
    )
    assert report["figures"]["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert report["figures"]["by_step"][0]["lm_loss"] == pytest.approx(
        expected["by_step"][0]["lm_loss"], rel=1e-5
    )
    assert report["baselines"]["bigram_nll"] < report["baselines"]["unigram_nll"]
    assert any("9 of" in note for note in report["notes"])


def test_as_json_and_elsewhere(checkpoint: Path, tmp_path: Path, capfd) -> None:
    words = [str(checkpoint), "--save-outputs", "preds,q_halt_logits", "--device", "cpu"]
    bounds = ["--batch-size", "2", "--max-batches", "3", "--output-dir", str(tmp_path / "o")]
    answer = Command(capfd)("evaluate", *words, *bounds, "--json")
    assert answer.status == 0, answer.err
    shown = json.loads(answer.out)
    assert shown["figures"]["examples"] == 6
    assert shown["files"]["outputs"] == str(tmp_path / "o" / "outputs-test.safetensors")
    assert load_file(shown["files"]["outputs"])["q_halt_logits"].shape == (6, 3)
    assert not list(checkpoint.glob("outputs-*"))


def test_steps_may_be_others(checkpoint: Path, capfd) -> None:
    answer = Command(capfd)(
        *("evaluate", str(checkpoint), "--overrides", "arch.halt_max_steps=5"),
        *("dataset.dataloader_workers=0", "--device", "cpu", "--json"),
    )
    assert answer.status == 0, answer.err
    shown = json.loads(answer.out)
    assert shown["figures"]["steps"] == len(shown["figures"]["by_step"]) == 5
    three = evaluate(checkpoint).figures
    for one, other in zip(three["by_step"], shown["figures"]["by_step"], strict=False):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-5)
    assert any("trained with 3" in note for note in shown["notes"])


def test_other_conversations_are_made_when_asked_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    same = evaluate(checkpoint, tokenizer_path=small.tokenizer_folder(), seq_len=64)
    assert same.data == data_of(checkpoint).directory
    shorter = evaluate(checkpoint, overrides={"dataset.seq_len": "32"})
    assert shorter.data != same.data
    assert Conversations(shorter.data).seq_len == 32
    assert shorter.figures["tokens"] < same.figures["tokens"]
    assert not [note for note in shorter.notes if "trained on" in note]
    # With a larger share held out, questions come into the test split that were trained on.
    more = evaluate(checkpoint, overrides={"dataset.test_ratio": "0.9"})
    trained = data_of(checkpoint)
    known = set(trained.examples["text"][trained.split("train")].tolist())
    other = Conversations(more.data)
    seen = sum(int(text) in known for text in other.examples["text"][other.split("test")])
    assert seen > 5
    assert any(f"{seen} of these" in note for note in more.notes)


def test_a_folder_of_data_may_be_named(checkpoint: Path, tmp_path: Path) -> None:
    other = small.build_conversations(tmp_path / "other", count=30)
    result = evaluate(checkpoint, overrides={"data.path": str(other.directory)})
    assert result.data == other.directory
    (checkpoint / "config.yaml").unlink()  # as a checkpoint of another program
    again = evaluate(checkpoint, overrides={"data.path": str(other.directory)})
    assert again.figures == result.figures
    assert any("not known" in note for note in again.notes)
    with pytest.raises(ConfigError, match=r"(?s)does not say .*--overrides data\.path="):
        evaluate(checkpoint)


def test_the_training_split_is_called_so(checkpoint: Path) -> None:
    result = evaluate(checkpoint, split="train")
    assert result.figures["examples"] == len(data_of(checkpoint).split("train"))
    assert any("trained on" in note for note in result.notes)


def test_what_is_too_good_is_said(checkpoint: Path, monkeypatch, capfd) -> None:
    """A model whose labels are its inputs would be right everywhere: here the figures say so."""
    from thimble.evaluation import evaluate_recursive as module

    real = module.evaluate_conversations

    def perfect(*args: Any, **options: Any) -> dict[str, Any]:
        return real(*args, **options) | {"exact_accuracy": 1.0, "nll": 0.0087}

    monkeypatch.setattr(module, "evaluate_conversations", perfect)
    answer = Command(capfd)("evaluate", str(checkpoint), "--device", "cpu")
    assert answer.status == 0, answer.err
    for text in ("100.0% of the answers are exact", "0.009 nats", "equal their own input"):
        assert text in answer.out
    assert read_json(checkpoint / "evaluation_report.json")["suspicious"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"model.hidden_size": "64"}}, r"hidden_size cannot .* data\.path"),
        ({"overrides": {"model.halt_max_steps": "many"}}, "halt_max_steps=many is not a number"),
        ({"overrides": {"dataset.seq_len": "65"}}, r"dataset\.seq_len=64"),
        ({"overrides": {"dataset.test_ratio": "3"}}, "test_ratio"),
        ({"save_outputs": ["logits"]}, "logits cannot be saved"),
        ({"split": "tests"}, "no split 'tests'"),
        ({"tasks": ["mmlu"]}, "--tasks is for other models"),
        ({"every": True}, "no checkpoints|recursive"),
    ],
    ids=str,
)
def test_bad_input(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ThimbleError, match=message):
        evaluate(checkpoint, **options)


def test_words_that_are_no_override_or_output(checkpoint: Path, capfd) -> None:
    answer = Command(capfd)("evaluate", str(checkpoint), "--overrides", "dataset.seqlen=4")
    assert answer.status == 2
    assert "dataset.seq_len=4" in answer.err
    answer = Command(capfd)("evaluate", str(checkpoint), "preds", "--device", "cpu")
    assert answer.status != 0  # without --save-outputs it is a checkpoint


def test_an_empty_split_says_what_to_change(tmp_path: Path) -> None:
    checkpoint = small.conversation_checkpoint(tmp_path)
    data = data_of(checkpoint)
    table = np.memmap(data.directory / "examples.bin", data.examples.dtype, mode="r+")
    table["split"] = 0
    table.flush()
    with pytest.raises(DataError, match=r"(?s)subset_size.*dataset\.test_ratio.*--split train"):
        evaluate(checkpoint)


def test_other_data_and_another_tokenizer_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from thimble.tokens.tokenizer import train

    train(["another text of other words"] * 9, 280).save(tmp_path / "other")
    with pytest.raises(DataError, match="not the tokenizer"):
        evaluate(checkpoint, tokenizer_path=tmp_path / "other")
    config = small.DatasetConfig(
        name=str(tmp_path / "records.jsonl"), tokenizer_path=str(tmp_path / "other"), seq_len=64
    )
    made = small.build(config, output=tmp_path / "foreign", workers=1).path
    with pytest.raises(DataError, match="another tokenizer"):
        evaluate(checkpoint, overrides={"data.path": str(made)}, split="train")
    change(data_of(checkpoint).directory / "manifest.json", fingerprint="another")
    with pytest.raises(DataError, match="built again"):
        evaluate(checkpoint)


def test_weights_that_are_not_numbers_are_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / interop.WEIGHTS)
    tensors["head.weight"][0] = float("nan")
    save_file(tensors, checkpoint / interop.WEIGHTS)
    with pytest.raises(DataError, match="not a number"):
        evaluate(checkpoint)


# -------------------------------------------------------------------------------------- puzzles


def test_a_puzzle_checkpoint_alone(tmp_path: Path, capfd) -> None:
    checkpoint = small.puzzle_checkpoint(tmp_path, small.puzzles())
    answer = Command(capfd)("evaluate", str(checkpoint), "--device", "cpu", "--batch-size", "5")
    assert answer.status == 0, answer.err
    report = read_json(checkpoint / "evaluation_report.json")
    assert report["figures"]["form"] == "stablemax"
    assert report["figures"]["puzzles"] == 13
    assert report["baselines"] is None
    assert report["suspicious"] == []
    assert len(report["figures"]["by_step"]) == 3
    assert "bigram" not in answer.out
    by_train = evaluate(checkpoint, split="train")
    assert any("trained on" in note for note in by_train.notes)
    with pytest.raises(ConfigError, match="train, test"):
        evaluate(checkpoint, split="val")


def test_puzzles_of_another_program_have_no_manifest(tmp_path: Path) -> None:
    data = small.build_puzzles(tmp_path / "data")
    checkpoint = small.puzzle_checkpoint(tmp_path, data)
    with_manifest = evaluate(checkpoint)
    (data / "manifest.json").unlink()
    change(checkpoint / "manifest.json", inputs={"tokens": Split(data, "train").fingerprint})
    assert evaluate(checkpoint).figures == with_manifest.figures
    change(checkpoint / "manifest.json", inputs={"tokens": "another"})
    with pytest.raises(DataError, match="built again"):
        evaluate(checkpoint)
    shutil.rmtree(data)
    with pytest.raises(DataError, match=r"no data at .*data\.path="):
        evaluate(checkpoint)
    with pytest.raises(DataError, match="no data at"):
        evaluate(checkpoint, overrides={"data.path": str(data)})


def test_the_report_can_be_drawn_from_its_file(checkpoint: Path) -> None:
    result = evaluate(checkpoint)
    kept = tables(read_json(checkpoint / "evaluation_report.json"))
    assert kept == tables(result.to_dict())
    (head, rows), (_, models) = kept
    assert len(rows) == result.figures["steps"] + 1
    assert all(len(row) == len(head) for row in rows)
    assert [row[0] for row in models] == ["this model (softmax)", "bigram", "unigram", "uniform"]


def test_other_puzzles_are_refused(tmp_path: Path) -> None:
    checkpoint = small.puzzle_checkpoint(tmp_path, small.puzzles())
    other = small.build_puzzles(tmp_path / "other", seq_len=16)
    with pytest.raises(DataError, match=r"16 positions .* other puzzles"):
        evaluate(checkpoint, overrides={"data.path": str(other)})
    with pytest.raises(ConfigError, match=r"no dataset\.name"):
        evaluate(checkpoint, overrides={"dataset.seq_len": "4"})
    shutil.rmtree(other / "test")
    with pytest.raises(DataError, match="no puzzles at"):
        evaluate(checkpoint, overrides={"data.path": str(other)})
    no_recursion = {"data.path": str(small.conversations().directory)}
    with pytest.raises(DataError, match="tokenizer"):
        evaluate(checkpoint, overrides=no_recursion)


@pytest.fixture(scope="module")
def arc_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ARC's shape that has learned nothing, and its data."""
    folder = tmp_path_factory.mktemp("arc")
    prefix = arc_files.make(folder / "files", training=1, evaluation=2)
    data = arc.build(
        folder / "data", input_file_prefix=prefix, subsets=["training", "evaluation"], num_aug=2
    )
    many = Split(data, "test").metadata.num_puzzle_identifiers
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    return small.puzzle_checkpoint(
        *(folder, data),
        **shape,
        H_cycles=1,
        halt_max_steps=2,
        puzzle_identifiers=many,
        puzzle_emb_len=2,
    )


def test_augmentations_of_arc_vote(arc_checkpoint: Path) -> None:
    result = evaluate(arc_checkpoint, save_outputs=["preds", "q_halt_logits"])
    data = result.data
    kept = load_file(result.files["outputs"])
    halting = torch.sigmoid(kept["q_halt_logits"][:, -1]).numpy()
    tokens = kept["preds"].numpy().astype(np.uint8)
    network: Any = interop.load_model(arc_checkpoint)
    rows = Split(data, "test").rows(np.arange(len(tokens)))
    with torch.no_grad():
        logits = network(
            torch.from_numpy(rows.inputs), puzzles_b=torch.from_numpy(rows.puzzle_identifiers)
        )
    assert np.array_equal(tokens, logits.argmax(-1).numpy())
    predictions = voting.Predictions(kept["examples"].numpy(), tokens, halting)
    score = voting.score(data, predictions)
    assert result.arc == score.to_dict()
    assert result.arc["without_prediction"] == 0
    assert read_json(result.files["submission"]) == score.submission
    part = evaluate(arc_checkpoint, subset_size=3)
    assert part.arc is not None
    assert part.arc["without_prediction"] == len(tokens) - 3


@pytest.mark.parametrize("batch", [4, 1000])  # with the second size one of them has nothing to do
def test_two_processes_vote_as_one(arc_checkpoint: Path, tmp_path: Path, batch: int) -> None:
    folder = tmp_path / "two"
    words = ["evaluate", str(arc_checkpoint), "--device", "cpu", "--json"]
    words += ["--batch-size", str(batch), "--save-outputs", "preds", "--output-dir", str(folder)]
    child = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "thimble", *words),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert child.returncode == 0, child.stderr
    two = json.loads(child.stdout)  # one object: the first process speaks
    one = evaluate(
        arc_checkpoint, save_outputs=["preds"], output_dir=tmp_path / "one", batch_size=4
    )
    assert two["arc"] == one.arc
    for ours, theirs in zip(two["figures"]["by_step"], one.figures["by_step"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    kept = [load_file(tmp_path / name / "outputs-test.safetensors") for name in ("one", "two")]
    assert torch.equal(kept[0]["examples"], kept[1]["examples"])
    assert torch.equal(kept[0]["preds"], kept[1]["preds"])
    assert read_json(folder / "submission.json") == read_json(tmp_path / "one" / "submission.json")
