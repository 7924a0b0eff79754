from __future__ import annotations

import json
import logging
import lzma
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.helpers_evaluation import reseal
from thimble import artifacts
from thimble.console import log
from thimble.evaluation import baselines
from thimble.evaluation.baselines import known_rungs, measure, xz_size
from thimble.evaluation.ngrams import NgramModel
from thimble.tokens.shards import TokenSplit


def texts(tokens: Path) -> list[bytes]:
    """The held-out documents, taken from the corpus itself and not from the tokens."""
    wanted = pq.read_table(tokens / "val.documents.parquet").column("id").to_pylist()
    original = artifacts.read_json(tokens / "manifest.json")["inputs"]["corpus"]["name"]
    from tests.helpers_training import token_directory

    corpus = pq.read_table(Path(token_directory()).parent / original / "documents-00000.parquet")
    by_id = dict(zip(*(corpus.column(c).to_pylist() for c in ("id", "text")), strict=True))
    return [by_id[name].encode() for name in wanted]


def test_every_rung_is_measured_on_the_same_bytes(tokens: Path) -> None:
    found, held_out = measure(tokens), texts(tokens)
    size = sum(map(len, held_out))
    assert found["bytes"] == size
    assert found["documents"] == len(held_out)
    rungs = found["rungs"]
    zstd = zstandard.ZstdCompressor(level=19, write_checksum=True)
    whole = b"".join(held_out)
    assert rungs["xz -9, whole text"] == 8 * len(lzma.compress(whole, preset=9)) / size
    assert rungs["zstd -19, whole text"] == 8 * len(zstd.compress(whole)) / size
    each = sum(len(lzma.compress(text, preset=9)) for text in held_out)
    assert rungs["xz -9, each document"] == 8 * each / size
    each = sum(len(zstd.compress(text)) for text in held_out)
    assert rungs["zstd -19, each document"] == 8 * each / size

    val, train = TokenSplit(tokens, "val"), TokenSplit(tokens, "train")
    assert rungs["uniform"] == pytest.approx(len(val) * np.log2(val.vocab_size) / size)
    for order, name in ((1, "unigram"), (2, "bigram"), (5, "5-gram")):
        model = NgramModel(np.asarray(train.tokens), order, val.vocab_size)
        bits = model.bits(val.tokens, val.eot_id, (order,))[order]
        assert rungs[name] == pytest.approx(bits / size)
    assert rungs["uniform"] > rungs["unigram"] > rungs["bigram"]


def test_measured_once_for_the_same_tokens(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(tokens)
    manifest = artifacts.read_manifest(tokens, "tokens", make="")
    assert not artifacts.damaged_files(tokens, manifest, hashes=True)
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "_ngram_bits", None)
        assert measure(tokens) == first
        assert known_rungs(tokens) == first["rungs"]
    kept = tokens / "baselines-val.json"
    kept.write_text(json.dumps({**first, "rungs": {}}))
    assert measure(tokens)["rungs"] == {}  # it does read what was kept

    ids = np.fromfile(tokens / "val.bin", dtype="<u2")
    ids[:-1] = ids[:-1][::-1]
    ids.tofile(tokens / "val.bin")
    reseal(tokens)
    # Other tokens: measured again, and now they do not decode to the documents' bytes.
    assert measure(tokens)["rungs"]["5-gram"] > first["rungs"]["5-gram"]


def test_a_limit_on_the_training_text_is_kept_and_said(tokens: Path) -> None:
    everything = measure(tokens)
    assert everything["notes"] == []
    limited = measure(tokens, train_tokens=400)
    assert limited["train_tokens"] <= 400
    assert f"count {limited['train_tokens']} of" in limited["notes"][0]
    assert limited["rungs"]["5-gram"] > everything["rungs"]["5-gram"]


def test_a_tokenizer_that_loses_bytes_leaves_the_compressors_out(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lossy:
        def decode(self, ids: list[int]) -> str:
            return "x"

    monkeypatch.setattr(baselines, "load_tokenizer", lambda path: Lossy())
    found = measure(tokens)
    assert set(found["rungs"]) == {"uniform", "unigram", "bigram", "5-gram"}
    assert "byte for byte" in found["notes"][0]


def test_tokens_that_cannot_be_written_to_are_measured_all_the_same(
    tokens: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, value: object) -> None:
        raise PermissionError(13, "read-only", str(path))

    monkeypatch.setattr(artifacts, "write_json", refuse)
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert measure(tokens)["rungs"]
    assert "could not be kept" in caplog.text


def test_xz_is_that_of_preset_9() -> None:
    draw = random.Random(1)
    words = [bytes(draw.choices(b"abcdefgh ", k=draw.randint(1, 9))) for _ in range(300)]
    for size in (0, 1, 30, 1000, 20_000):
        text = b" ".join(draw.choices(words, k=size))
        assert xz_size(text) == len(lzma.compress(text, preset=9))
    noise = draw.randbytes(5000)
    assert xz_size(noise) == len(lzma.compress(noise, preset=9))
