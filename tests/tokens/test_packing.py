"""Packed chunks: every document whole and once, boundaries kept, nothing made that is there."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from thimble import artifacts
from thimble.errors import ConfigError, DataError, EnvironmentProblem
from thimble.tokens import packing, splits
from thimble.tokens.packed import PackedChunks
from thimble.tokens.packing import ChunkWriter, Packed, pack
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("small_pieces")


def write(path: Path, texts: list[str], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()
    squeeze: Any = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=11)
    else:
        path.write_bytes(squeeze(data))
    return path


def documents(chunks: PackedChunks, tokenizer: Tokenizer) -> list[str]:
    """The texts, put together again from all chunks in their order."""
    batch = chunks.rows(np.arange(chunks.count))
    ids = batch.inputs[batch.labels != -100]
    ends = np.flatnonzero(ids == tokenizer.eot_id) + 1
    assert ends[-1] == len(ids)
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends[:-1])]


def shards(output: Path) -> dict[str, float]:
    return {str(p.relative_to(output)): p.stat().st_mtime_ns for p in output.rglob("*.parquet")}


# ---------------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize(
    ("name", "length"),
    [
        *(("a.jsonl", length) for length in (2, 7, 32, 33, 100_000)),
        *((name, 32) for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet")),
    ],
)
def test_every_document_comes_back_whole_and_in_order(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, texts: list[str], name: str, length: int
) -> None:
    write(tmp_path / "in" / name, texts)
    done = pack(
        tmp_path / "in",
        tmp_path / "out",
        max_seq_length=length,
        tokenizer=str(folder),
        val_ratio=0,
        workers=1,
    )
    chunks = PackedChunks(tmp_path / "out")
    assert documents(chunks, tokenizer) == texts
    expected = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert done.counts["train"] == {
        "documents": len(texts),
        "tokens": expected,
        "chunks": -(-expected // length),
        "padding": -expected % length,
    }
    assert chunks.tokens == expected


def test_plain_text_is_packed_too(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    for name, text in (("b/one.txt", "one text"), ("b/two.md", "two texts"), ("c/x.txt", "three")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    options: dict[str, Any] = {"tokenizer": str(folder), "val_ratio": 0, "max_seq_length": 8}
    done = pack(tmp_path / "in", tmp_path / "out", recursive=True, **options)
    assert done.made == 2  # the text files of one folder are one input
    assert sorted(documents(PackedChunks(tmp_path / "out"), tokenizer)) == [
        "one text",
        "three",
        "two texts",
    ]


@pytest.mark.parametrize("length", [5, 32, 1000])
def test_boundaries_are_where_documents_begin(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, texts: list[str], length: int
) -> None:
    write(tmp_path / "a.jsonl", texts)
    pack(
        tmp_path / "a.jsonl",
        tmp_path / "out",
        max_seq_length=length,
        tokenizer=str(folder),
        val_ratio=0,
    )
    chunks = PackedChunks(tmp_path / "out")
    batch = chunks.rows(np.arange(chunks.count))
    flat = batch.inputs.ravel()
    expected = np.append(True, flat[:-1] == tokenizer.eot_id)
    expected[batch.labels.ravel() == -100] = False
    expected[::length] = True  # what goes on from another chunk has no memory of it
    assert np.array_equal(batch.starts.ravel(), expected)
    found = chunks.document_hashes()
    assert set(found.tolist()) == {splits.text_hash(text) for text in texts}


def test_writers_and_columns(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, texts: list[str]
) -> None:
    write(tmp_path / "a.jsonl", texts)
    pack(tmp_path / "a.jsonl", tmp_path / "out", max_seq_length=32, tokenizer=str(folder))
    paths = sorted((tmp_path / "out").rglob("train-*.parquet"))
    assert len(paths) > 2
    for number, path in enumerate(paths):
        file = pyarrow.parquet.ParquetFile(path)
        names = ["input_ids", "document_starts", "documents"]
        # Only where there is padding does a mask say more than the ids.
        assert file.schema_arrow.names == names + ["attention_mask"] * (number == len(paths) - 1)
        assert file.schema_arrow.field("input_ids").type.list_size == 32
        assert {
            file.metadata.row_group(group).column(column).compression
            for group in range(file.num_row_groups)
            for column in range(len(file.schema_arrow.names))
        } == {"SNAPPY"}
    last = pyarrow.parquet.read_table(paths[-1])
    mask = np.array(last["attention_mask"].to_pylist()[0])
    assert last.num_rows == 1
    assert (np.diff(mask) <= 0).all()
    assert 0 < mask.sum() < 32
    manifest = artifacts.read_json(tmp_path / "out/manifest.json")
    assert manifest["kind"] == "packed"
    assert not artifacts.damaged_files(tmp_path / "out", manifest, hashes=True)
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_the_writer_holds_a_row_group_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    with ChunkWriter(tmp_path, "train", 10, 0) as writer:
        for _ in range(200):
            lengths = rng.integers(1, 40, size=5)
            ids = rng.integers(1, 9, size=lengths.sum()).astype(np.int32)
            writer.append(ids, lengths, rng.integers(0, 2**60, 5).astype(np.uint64))
            assert sum(map(len, writer.waiting)) < 200
            assert len(writer.starts) <= 201
        writer.finish()
    assert writer.counts["chunks"] * 10 == writer.counts["tokens"] + writer.counts["padding"]


@pytest.mark.parametrize("add", [True, False])
def test_a_tokenizer_that_begins_texts_with_a_token_begins_documents_with_it(
    tmp_path: Path, folder: Path, texts: list[str], add: bool
) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<|begin|>", special=True, normalized=False)])
    begin = backend.token_to_id("<|begin|>")
    if add:
        backend.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
        )
    (tmp_path / "t").mkdir()
    backend.save(str(tmp_path / "t/tokenizer.json"))
    write(tmp_path / "a.jsonl", texts)
    options: dict[str, Any] = {"max_seq_length": 16, "val_ratio": 0}
    pack(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=str(tmp_path / "t"), **options)
    chunks = PackedChunks(tmp_path / "out")
    flat = chunks.rows(np.arange(chunks.count)).inputs.ravel()
    begins = np.flatnonzero(flat == begin)
    assert len(begins) == (len(texts) if add else 0)
    if add:
        used = load_tokenizer(tmp_path / "t")
        assert [0, *(np.flatnonzero(flat == used.eot_id) + 1)][: len(begins)] == list(begins)
        assert flat[1 : 1 + len(used.encode(texts[0]))].tolist() == used.encode(texts[0])


def test_the_result_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "TASK_CHARACTERS", 100)  # enough input for two
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "in" / name, texts)
    for workers in (1, 2):
        pack(
            tmp_path / "in",
            tmp_path / str(workers),
            max_seq_length=16,
            tokenizer=str(folder),
            workers=workers,
        )
    one, two = (artifacts.read_json(tmp_path / n / "manifest.json") for n in ("1", "2"))
    assert one["files"] == two["files"]
    assert one["fingerprint"] == two["fingerprint"]


# --------------------------------------------------------------- what is made, and what is kept


def test_only_what_changed_is_made_anew(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, texts: list[str]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    options: dict[str, Any] = {
        "recursive": True,
        "max_seq_length": 16,
        "tokenizer": str(folder),
        "val_ratio": 0,
    }

    def run(**more: Any) -> Packed:
        return pack(source, output, **options, **more)

    # Two files of one name, and one that differs in its ending only.
    for number, name in enumerate(("x/a.jsonl", "y/a.jsonl", "x/a.parquet", "x-a.jsonl")):
        write(source / name, texts[10 * number : 10 * number + 10])
    assert (run().made, run().made, run(skip_existing=True).made) == (4, 0, 0)
    assert sorted(documents(PackedChunks(output), tokenizer)) == sorted(texts[:40])
    before = shards(output)
    write(source / "y/a.jsonl", texts[50:60])  # of about the same size and time
    assert (run().made, run().kept) == (1, 4)
    changed = {name for name, when in shards(output).items() if before.get(name) != when}
    assert changed
    assert all(name.startswith("y-a") for name in changed)
    (source / "x/a.parquet").touch()
    assert run().made == 0  # by content, not by date
    write(source / "new.jsonl", texts[60:70])
    assert run().made == 1
    (source / "x/a.jsonl").unlink()
    assert (run().made, run().kept) == (0, 4)
    expected = [*texts[50:60], *texts[20:40], *texts[60:70]]
    assert sorted(documents(PackedChunks(output), tokenizer)) == sorted(expected)
    assert run(force=True).made == 4
    source.rename(tmp_path / "renamed")
    source = tmp_path / "renamed"
    assert run().made == 0
    options["max_seq_length"] = 8
    assert run().made == 4
    assert PackedChunks(output).length == 8


def test_killed_in_the_middle_the_folder_is_no_data_set_and_what_is_whole_is_kept(
    tmp_path: Path, folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write(tmp_path / "in" / f"{name}.jsonl", texts[:20])
    options: dict[str, Any] = {"max_seq_length": 16, "tokenizer": str(folder)}
    pack(tmp_path / "in", tmp_path / "whole", **options)
    real = packing._make

    def stop(unit: Any, *more: Any) -> None:
        if unit.name == "b.jsonl":
            raise KeyboardInterrupt
        real(unit, *more)

    monkeypatch.setattr(packing, "_make", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "in", tmp_path / "out", **options)
    with pytest.raises(DataError, match="not a complete packed"):
        PackedChunks(tmp_path / "out")
    monkeypatch.setattr(packing, "_make", real)
    assert pack(tmp_path / "in", tmp_path / "out", **options).kept == 1
    whole, cut = (artifacts.read_json(tmp_path / n / "manifest.json") for n in ("whole", "out"))
    assert whole["files"] == cut["files"]


def test_a_damaged_shard_is_made_anew(tmp_path: Path, folder: Path, texts: list[str]) -> None:
    write(tmp_path / "a.jsonl", texts)
    options: dict[str, Any] = {"max_seq_length": 16, "tokenizer": str(folder)}
    pack(tmp_path / "a.jsonl", tmp_path / "out", **options)
    shard = next((tmp_path / "out").rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert pack(tmp_path / "a.jsonl", tmp_path / "out", **options).made == 1


def test_folders_of_others_are_left_alone(tmp_path: Path, folder: Path, texts: list[str]) -> None:
    options: dict[str, Any] = {"max_seq_length": 16, "tokenizer": str(folder)}
    write(tmp_path / "one/a.jsonl", texts)
    write(tmp_path / "two/b.jsonl", texts)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").touch()
    with pytest.raises(ConfigError, match="holds something else"):
        pack(tmp_path / "one", tmp_path / "out", **options)
    (tmp_path / "out/thesis.txt").unlink()
    pack(tmp_path / "one", tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="chunks of other input"):
        pack(tmp_path / "two", tmp_path / "out", **options)
    (tmp_path / "out/mine").mkdir()
    (tmp_path / "out/mine/manifest.json").write_text('{"kind": "corpus"}')
    pack(tmp_path / "two", tmp_path / "out", force=True, **options)
    assert (tmp_path / "out/mine/manifest.json").exists()
    with artifacts.locked(tmp_path / "out", "x"), pytest.raises(EnvironmentProblem):
        pack(tmp_path / "two", tmp_path / "out", **options)


# ------------------------------------------------------------------------------------ bad input


def test_bad_input_is_refused_with_what_to_do(
    tmp_path: Path, folder: Path, texts: list[str]
) -> None:
    options: dict[str, Any] = {"tokenizer": str(folder), "max_seq_length": 16}

    def refused(kind: type[Exception], match: str, **more: Any) -> None:
        with pytest.raises(kind, match=match):
            pack(tmp_path / "in", tmp_path / "out", **options | more)
        assert not (tmp_path / "out/manifest.json").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    refused(DataError, "does not exist")
    (tmp_path / "in/sub").mkdir(parents=True)
    refused(DataError, "--recursive")
    refused(DataError, "Nothing to read", recursive=True)
    (tmp_path / "in/a.csv").write_text("a,b")
    refused(DataError, "Nothing to read")
    write(tmp_path / "in/a.jsonl", texts, license="mit")
    refused(ConfigError, "the opposite", force=True, skip_existing=True)
    refused(ConfigError, "at least 2", max_seq_length=1)
    refused(ConfigError, "val_ratio", val_ratio=1.0)
    refused(DataError, "no tokenizer", tokenizer=str(tmp_path / "none.json"))
    (tmp_path / "in/a.jsonl").write_text('{"body": "x"}\n')
    refused(DataError, "body")
    (tmp_path / "in/a.jsonl").write_text('{"text": "x"\n')
    refused(DataError, "not JSON")
    (tmp_path / "in/a.jsonl").write_text('{"text": " "}\n')
    refused(DataError, "none for training")
    (tmp_path / "in/a.jsonl").unlink()
    (tmp_path / "in/a.parquet").write_bytes(b"PAR1")
    refused(DataError, "truncated or damaged")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "in/a.parquet")
    refused(DataError, "body")
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="is a file"):
        pack(tmp_path / "in", tmp_path / "out", **options)


def test_without_a_tokenizer_it_is_llamas(
    tmp_path: Path, folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", texts)
    with pytest.raises(EnvironmentProblem, match=r"meta-llama/Llama-3\.2-1B"):
        pack(tmp_path / "a.jsonl", tmp_path / "out", max_seq_length=16)
    monkeypatch.setenv("LLAMA_TOKENIZER", str(folder))
    pack(tmp_path / "a.jsonl", tmp_path / "out", max_seq_length=16)
