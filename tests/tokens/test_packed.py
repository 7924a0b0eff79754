"""Packed chunks as they are read: trained on and held out, in batches, and shifted once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.tokens.test_packing import documents, write
from thimble import artifacts
from thimble.errors import DataError
from thimble.tokens import packed as loading
from thimble.tokens import packing
from thimble.tokens.packed import PackedChunks, train_and_validation
from thimble.tokens.packing import pack
from thimble.tokens.tokenizer import Tokenizer, train

pytestmark = pytest.mark.usefixtures("small_pieces")


# ----------------------------------------------------------------------- training and validation


def test_train_and_val_have_no_document_in_common(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, texts: list[str]
) -> None:
    # The same texts again in another file, with other case and spaces.
    write(tmp_path / "in/a.jsonl", texts)
    write(tmp_path / "in/b.jsonl", [f"  {text.upper()}\n" for text in texts])
    out = tmp_path / "out"
    options: dict[str, Any] = {"max_seq_length": 16, "tokenizer": str(folder)}
    done = pack(tmp_path / "in", out, val_ratio=0.2, **options)
    training, validation = train_and_validation(out, out)
    assert not set(training.document_hashes()) & set(validation.document_hashes())
    assert (training.split, validation.split) == ("train", "val")
    both = Counter(documents(training, tokenizer)) + Counter(documents(validation, tokenizer))
    assert sum(both.values()) == 2 * len(texts)
    assert 0.1 < done.counts["val"]["documents"] / (2 * len(texts)) < 0.3
    (tmp_path / "link").symlink_to(out)
    assert train_and_validation(out, tmp_path / "link")[1].split == "val"


def test_of_another_folder_what_is_trained_on_does_not_count(
    tmp_path: Path,
    folder: Path,
    tokenizer: Tokenizer,
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path / "a.jsonl", texts[:80])
    write(tmp_path / "b.jsonl", texts[60:])
    options: dict[str, Any] = {"max_seq_length": 16, "tokenizer": str(folder)}
    pack(tmp_path / "a.jsonl", tmp_path / "a", **options)
    pack(tmp_path / "b.jsonl", tmp_path / "b", **options)
    training, validation = train_and_validation(tmp_path / "a", tmp_path / "b")
    trained_on = set(documents(training, tokenizer))
    batch = validation.rows(np.arange(validation.count))
    ids = batch.inputs[batch.labels != -100]
    kept = [text for text in texts[60:] if text not in trained_on]
    assert Counter(ids.tolist()) == Counter(
        token for text in kept for token in [*tokenizer.encode(text), tokenizer.eot_id]
    )
    assert f"{60 - len(kept)} of 60 documents" in caplog.text
    pack(tmp_path / "a.jsonl", tmp_path / "c", **options | {"val_ratio": 0})
    pack(tmp_path / "a.jsonl", tmp_path / "d", **options | {"max_seq_length": 8})
    with pytest.raises(DataError, match="name the same folder for both"):
        train_and_validation(tmp_path / "c", tmp_path / "d")


def test_no_validation_and_other_tokenizers_are_refused(
    tmp_path: Path, folder: Path, texts: list[str]
) -> None:
    write(tmp_path / "a.jsonl", texts)
    pack(
        tmp_path / "a.jsonl", tmp_path / "a", max_seq_length=16, tokenizer=str(folder), val_ratio=0
    )
    with pytest.raises(DataError, match="--val-ratio"):
        train_and_validation(tmp_path / "a", tmp_path / "a")
    train(texts, 300).save(tmp_path / "other")
    pack(tmp_path / "a.jsonl", tmp_path / "b", max_seq_length=16, tokenizer=str(tmp_path / "other"))
    with pytest.raises(DataError, match="different tokenizers"):
        train_and_validation(tmp_path / "a", tmp_path / "b")


# ----------------------------------------------------------------------------------- the loader


@pytest.fixture
def chunks(
    tmp_path: Path, folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> PackedChunks:
    monkeypatch.setattr(loading, "WINDOW", 3)
    loading._epoch.cache_clear()
    for name in "abc":
        write(tmp_path / "in" / f"{name}.jsonl", [f"{name} {text}" for text in texts])
    pack(tmp_path / "in", tmp_path / "out", max_seq_length=16, tokenizer=str(folder), val_ratio=0)
    return PackedChunks(tmp_path / "out", seed=5)


def test_every_chunk_once_an_epoch_and_epochs_differ(chunks: PackedChunks) -> None:
    orders = [chunks.order(epoch * chunks.count, chunks.count) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(chunks.count))
    assert (orders[0] == orders[1]).mean() < 0.05
    assert (
        orders[0] == PackedChunks(chunks.directory, seed=6).order(0, chunks.count)
    ).mean() < 0.05
    assert (np.diff(orders[0]) == 1).mean() < 0.1


@pytest.mark.parametrize("sizes", [[60], [20] * 3, [1] * 60, [7, 50, 3]])
def test_a_batch_is_a_function_of_seed_and_place(chunks: PackedChunks, sizes: list[int]) -> None:
    place = begin = chunks.count - 25  # over the end of an epoch
    read = []
    for size in sizes:
        read.append(PackedChunks(chunks.directory, seed=5).batch(place, size))
        place += size
    whole = chunks.batch(begin, 60)
    for key in ("inputs", "labels", "starts", "numbers"):
        assert np.array_equal(np.concatenate([getattr(b, key) for b in read]), getattr(whole, key))
    in_order = chunks.rows(np.arange(chunks.count))
    assert np.array_equal(whole.inputs, in_order.inputs[whole.numbers])
    far = 10**9 * chunks.count
    assert sorted(chunks.order(far, chunks.count).tolist()) == list(range(chunks.count))


def test_each_row_group_is_decoded_about_once_an_epoch(
    chunks: PackedChunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = Counter[tuple[str, int]]()
    real = PackedChunks._decode

    def note(self: PackedChunks, file: Any, name: str, index: int) -> Any:
        decoded[name, index] += 1
        return real(self, file, name, index)

    monkeypatch.setattr(PackedChunks, "_decode", note)
    for place in range(0, chunks.count, 4):
        chunks.batch(place, 4)
    assert len(decoded) == len(chunks.sizes)
    assert decoded.total() < 1.2 * len(chunks.sizes)
    assert len(chunks.decoded) <= 2 * loading.WINDOW


def test_targets_are_shifted_once_for_the_student_and_for_the_teacher(
    chunks: PackedChunks, tokenizer: Tokenizer
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from thimble.objectives.linear_cross_entropy import token_losses

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=chunks.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    batch = chunks.batch(0, 6)
    for place in range(chunks.length - 1):
        assert np.array_equal(batch.targets[:, place], batch.inputs[:, place + 1])
    assert (batch.targets[:, -1] == -100).all()
    inputs, labels, targets = map(torch.from_numpy, (batch.inputs, batch.labels, batch.targets))
    with torch.no_grad():
        teacher = model(inputs, labels=labels).loss  # transformers shifts by itself
        hidden = model.model(inputs).last_hidden_state
        student = token_losses(hidden, model.lm_head.weight, targets)
        wrong = model(inputs, labels=targets).loss
    student = student[targets != -100].mean()
    assert abs(float(teacher - student)) < 1e-5
    assert abs(float(teacher - wrong)) > 1e-3  # so twice would be seen


def test_stored_labels_count_before_the_ids(chunks: PackedChunks) -> None:
    """Another program may write labels, at the place of their own tokens."""
    name = chunks.names[0]
    table = pyarrow.parquet.read_table(chunks.directory / name)
    ids = np.array(table["input_ids"].to_pylist())
    labels = np.where(np.arange(16) < 4, -100, ids)
    column = packing._fixed(labels.ravel().astype(np.int32), 16, pyarrow.int32())
    pyarrow.parquet.write_table(table.append_column("labels", column), chunks.directory / name)
    manifest = artifacts.read_json(chunks.directory / "manifest.json")
    manifest["files"][name]["bytes"] = (chunks.directory / name).stat().st_size
    artifacts.write_json(chunks.directory / "manifest.json", manifest)
    batch = PackedChunks(chunks.directory).rows(np.arange(len(ids)))
    assert np.array_equal(batch.labels, labels)
    assert (batch.targets[:, :3] == -100).all()
    assert np.array_equal(batch.targets[:, 3:-1], ids[:, 4:])


def test_a_folder_that_does_not_fit_is_refused(chunks: PackedChunks, tmp_path: Path) -> None:
    out = chunks.directory
    with pytest.raises(DataError, match="There is no packed"):
        PackedChunks(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"chunks of 16 tokens, not of 32.*\n.*--max-seq-length 32"):
        PackedChunks(out, length=32)
    name = chunks.names[0]
    whole, manifest = (out / name).read_bytes(), (out / "manifest.json").read_text()

    def refused(match: str, **counts: int) -> None:
        changed = json.loads(manifest)
        changed["files"][name]["bytes"] = (out / name).stat().st_size
        changed["counts"]["train"] |= counts
        (out / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=match):
            PackedChunks(out).rows(np.arange(4))

    refused("its manifest says 7", chunks=7)
    (out / name).write_bytes(whole[:-30])
    refused("is damaged")
    (out / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match="bytes instead of"):
        PackedChunks(out)
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(whole))
    pyarrow.parquet.write_table(table.drop_columns(["documents"]), out / name)
    refused("no column documents; it has input_ids, document_starts")
    ids = np.array(table["input_ids"].to_pylist(), dtype=np.int32)
    other = packing._fixed(ids[:, :8].ravel(), 8, pyarrow.int32())
    pyarrow.parquet.write_table(table.set_column(0, "input_ids", other), out / name)
    refused("not 16 in each chunk")
    ids[2, 3] = 400_000
    bad = packing._fixed(ids.ravel(), 16, pyarrow.int32())
    pyarrow.parquet.write_table(table.set_column(0, "input_ids", bad), out / name)
    refused("outside of its vocabulary")
    (out / name).unlink()
    with pytest.raises(DataError, match="is missing"):
        PackedChunks(out)
