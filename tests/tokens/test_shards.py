"""A tokens directory whose files, manifest and ids disagree is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers_tokens import documents, write_corpus
from thimble import tokens
from thimble.errors import DataError
from thimble.tokens.shards import TokenSplit, check_tokenizer, dtype_for
from thimble.tokens.tokenizer import load_tokenizer, train


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shards")
    corpus = write_corpus(home / "corpus", documents())
    return tokens.build(corpus, output=home / "tokens", vocab_size=400, workers=1)


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "tokens"))


def test_dtype_holds_every_id() -> None:
    for size, name in ((259, "<u2"), (65536, "<u2"), (65537, "<u4"), (128256, "<u4")):
        assert dtype_for(size) == np.dtype(name)
        assert np.iinfo(dtype_for(size)).max >= size - 1


def test_opens_what_was_built(built: Path) -> None:
    split = TokenSplit(built, "val")
    assert split.tokens.dtype == split.dtype == np.dtype("<u2")
    assert len(split) == split.manifest["counts"]["val"]["tokens"] == len(split.tokens)
    assert split.documents["tokens"].to_numpy().sum() == len(split)
    assert (split.vocab_size, split.eot_id) == (400, 0)
    with pytest.raises(ValueError, match="read-only"):
        split.tokens[0] = 1


@pytest.mark.parametrize("change", [-1, -100, 2, 1000])
def test_a_resized_file(copy: Path, change: int) -> None:
    data = (copy / "train.bin").read_bytes()
    (copy / "train.bin").write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(DataError, match=rf"train\.bin has {len(data) + change:,} bytes.*cut off"):
        TokenSplit(copy, "train")
    TokenSplit(copy, "val")


@pytest.mark.parametrize("where", [0, -1, 1234])
def test_an_id_beyond_the_vocabulary(copy: Path, where: int) -> None:
    ids = np.fromfile(copy / "train.bin", "<u2")
    ids[where] = 400
    ids.tofile(copy / "train.bin")
    at = where % len(ids)
    with pytest.raises(DataError, match=rf"id 400 at token {at:,}, but its vocabulary has 400"):
        TokenSplit(copy, "train")


def test_a_missing_or_empty_file_and_a_wrong_name(copy: Path) -> None:
    (copy / "test.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"test\.bin has 0 bytes"):
        TokenSplit(copy, "test")
    (copy / "test.bin").unlink()
    with pytest.raises(DataError, match=r"test\.bin is missing"):
        TokenSplit(copy, "test")
    with pytest.raises(DataError, match="no split 'dev'; there are train, val, test"):
        TokenSplit(copy, "dev")
    with pytest.raises(DataError, match=r"There is no tokens at .*\n  thimble tokens build"):
        TokenSplit(copy / "nowhere", "train")
    (copy / "val.documents.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match=r"val\.documents\.parquet cannot be read"):
        _ = TokenSplit(copy, "val").documents


def test_a_manifest_without_a_key(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["dtype"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json does not say .dtype"):
        TokenSplit(copy, "train")


def test_a_tokenizer_of_other_shards(built: Path, tmp_path: Path) -> None:
    split = TokenSplit(built, "val")
    check_tokenizer(split.manifest, load_tokenizer(built), built)
    train([row["text"] for row in documents(50)], 400).save(tmp_path)
    other = load_tokenizer(tmp_path)
    assert other.vocab_size == split.vocab_size
    with pytest.raises(DataError, match="not the one these tokens were made with"):
        check_tokenizer(split.manifest, other, tmp_path)
