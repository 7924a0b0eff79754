"""Packed chunks train students: documents apart, from the teacher as from its cache, resumed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import helpers_distill, helpers_training
from tests.helpers_distill import config
from tests.helpers_training import WINDOW, state_of, timeless, token_directory
from thimble import api
from thimble.errors import DataError
from thimble.models import interop
from thimble.teachers import open_examples
from thimble.teachers.fill import fill
from thimble.tokens.packed import PackedChunks
from thimble.tokens.packed_text import PackedText
from thimble.tokens.packing import pack
from thimble.tokens.tokenizer import load_tokenizer
from thimble.training import plan, train
from thimble.training.data import open_data
from thimble.training.distillation import open_teacher
from thimble.training.rows import evaluate_chunks


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers_distill.packed_in(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers_distill.teacher_in(tmp_path_factory.mktemp("teacher"))


def test_direct_cached_and_resumed(packed: Path, teacher: Path, tmp_path: Path) -> None:
    words = [f"data.path={packed}", "training.log_every=1"]
    direct = train(config(tmp_path, teacher, *words))
    data = open_examples(packed, "train", WINDOW)
    asked = open_teacher(config(tmp_path, teacher, *words), data, torch.device("cpu"))
    fill(tmp_path / "cache", data, asked)
    kept = [f"teacher.cache={tmp_path / 'cache'}", "teacher.mode=cached"]
    cached = train(config(tmp_path, teacher, *words, *kept))
    for key in ("loss", "kl", "val_teacher_kl", "val_loss"):
        one, other = ([r[key] for r in run.metrics if key in r] for run in (direct, cached))
        assert one
        assert one == pytest.approx(other, rel=2e-3, abs=2e-3), key
    copy = tmp_path / "copy"
    shutil.copytree(direct.path, copy)
    for path in sorted((copy / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    again = train(config(tmp_path, teacher, *words), resume=copy)
    assert again.latest is not None
    assert direct.latest is not None
    assert state_of(again.latest) == state_of(direct.latest)
    assert timeless(copy) == timeless(direct.path)


@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_what_is_held_out_is_every_target_once(mixer: str, packed: Path, tmp_path: Path) -> None:
    words = [f"data.path={packed}", "evaluation.max_tokens=null"]
    student = config(tmp_path, None, *words)
    if mixer == "attention":
        student = helpers_training.config(tmp_path, *words)
    run = train(student)
    record = [r for r in run.metrics if "val_loss" in r][-1]
    assert "val_bits_per_byte" not in record
    assert run.checkpoint is not None
    model = interop.load_model(run.checkpoint)
    best = min(r["val_loss"] for r in run.metrics if "val_loss" in r)
    chunks = PackedChunks(packed, "val")
    batch = chunks.rows(np.arange(len(chunks)))
    starts = torch.from_numpy(batch.starts)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.inputs), starts_bt=starts)
    targets = torch.from_numpy(batch.targets)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert best == pytest.approx(loss.item(), rel=1e-5)
    assert record["val_tokens"] == int((targets >= 0).sum())

    def ones(inputs: torch.Tensor, targets: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (targets >= 0).float()

    few = evaluate_chunks(ones, chunks, 4, 3 * WINDOW, torch.device("cpu"), [])
    assert few["loss"] == 1
    assert few["tokens"] <= 3 * WINDOW


def test_evaluated_as_in_training(
    packed: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thimble.evaluation.evaluate.TEXTS", 2)
    run = train(config(tmp_path, teacher, f"data.path={packed}", "evaluation.max_tokens=null"))
    found: Any = api.evaluate(run.path, device="cpu")
    last = next(r for r in run.metrics if r.get("step") == found.step and "val_loss" in r)
    for name in ("loss", "teacher_kl", "teacher_agreement", "calibration_error"):
        assert found.figures[name] == pytest.approx(last[f"val_{name}"], rel=1e-4), name
    # Asked for the test split, there is one only; its bytes are those of the words it predicts.
    assert found.split == "val"
    assert any("there is no other split" in note for note in found.notes)
    chunks = PackedChunks(packed, "val")
    tokenizer = load_tokenizer(packed)
    ids = chunks.rows(np.arange(len(chunks))).targets.ravel()
    text = tokenizer.decode(ids[(ids >= 0) & (ids != chunks.eot_id)].tolist())
    assert found.figures["bytes"] == len(text.encode())
    nats = found.figures["loss"] * found.figures["tokens"]
    assert found.figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()))
    assert found.real["texts"] == 2


def test_packed_text_has_every_word_of_the_chunks_once(packed: Path) -> None:
    chunks, tokenizer = PackedChunks(packed, "val"), load_tokenizer(packed)
    text = PackedText(chunks, tokenizer, 10**6)
    table = text.documents.to_pydict()
    parts = [
        tokenizer.decode(text.tokens[start : start + size - 1].tolist())
        for start, size in zip(table["start"], table["tokens"], strict=True)
    ]
    assert [len(part.encode()) for part in parts] == table["bytes"]
    batch = chunks.rows(np.arange(len(chunks)))
    ids = batch.labels[(batch.labels >= 0) & (batch.labels != chunks.eot_id)]
    assert "".join(parts) == tokenizer.decode(ids.tolist())
    assert (text.tokens[np.cumsum(table["tokens"]) - 1] == chunks.eot_id).all()
    assert len(PackedText(chunks, tokenizer, 3 * WINDOW)) <= 6 * WINDOW


def test_the_plan_and_another_length(packed: Path, tmp_path: Path) -> None:
    chosen = config(tmp_path, None, f"data.path={packed}")
    found = plan.plan(chosen)
    assert found.examples == open_data(chosen).count
    with pytest.raises(DataError, match="max-seq-length 8"):
        open_data(config(tmp_path, None, f"data.path={packed}", "training.sequence_length=8"))


def test_another_folder_to_judge_by(packed: Path, tmp_path: Path) -> None:
    lines = (packed.parent / "in" / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join([*lines[:20], '{"text": "the kernel loads once"}\n']))
    words = {"tokenizer": token_directory(), "max_seq_length": WINDOW, "val_ratio": 0, "workers": 1}
    pack(tmp_path / "b.jsonl", tmp_path / "other", **words)
    chosen = config(tmp_path, None, f"data.path={packed}", f"data.val_path={tmp_path / 'other'}")
    held_out = open_data(chosen, "val")
    assert held_out.directory == tmp_path / "other"
    trained_on = PackedChunks(packed).document_hashes()
    batch = held_out.rows(np.arange(len(held_out)))
    known = np.intersect1d(held_out.document_hashes(), trained_on)
    assert len(known)
    # What is trained on counts nowhere.
    alone = PackedChunks(tmp_path / "other", None).rows(np.arange(len(held_out)))
    assert 0 < (batch.labels != -100).sum() < (alone.labels != -100).sum()
    same = config(tmp_path, None, f"data.path={packed}", f"data.val_path={packed}")
    assert open_data(same, "val").count == PackedChunks(packed, "val").count
    # Made anew, it is read anew.
    pack(tmp_path / "b.jsonl", tmp_path / "other", **(words | {"val_ratio": 0.5}))
    assert open_data(chosen, "val") is not held_out
