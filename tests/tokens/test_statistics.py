"""The numbers of stats.json are those of the shards, and missed thresholds are said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from tests.helpers_tokens import documents, write_corpus
from thimble import tokens
from thimble.tokens.shards import SPLITS, TokenSplit
from thimble.tokens.tokenizer import load_tokenizer, train


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", documents())


def stats_of(directory: Path) -> dict:
    return json.loads((directory / "stats.json").read_text())


def test_the_numbers_are_those_of_the_shards(corpus: Path, tmp_path: Path) -> None:
    directory = tokens.build(corpus, output=tmp_path / "tokens", vocab_size=400, workers=1)
    stats = stats_of(directory)
    text = {row["id"]: row["text"] for row in documents()}
    for name in SPLITS:
        split = TokenSplit(directory, name)
        size = sum(len(text[i].encode()) for i in split.documents["id"].to_pylist())
        count = int(np.sum(split.tokens != split.eot_id))
        assert stats["splits"][name]["bytes_per_token"] == pytest.approx(size / count)
        by_source = stats["splits"][name]["sources"]
        assert set(by_source) == {"pages", "code"}
        for key in ("documents", "tokens", "bytes"):
            total = sum(source[key] for source in by_source.values())
            assert total == stats["splits"][name][key]
    train_ids = TokenSplit(directory, "train").tokens
    occurrences = np.bincount(train_ids, minlength=400)[1:]
    vocabulary = stats["vocabulary"]
    assert vocabulary["used_in_train"] == np.count_nonzero(occurrences)
    assert vocabulary["rare"] == np.sum((occurrences > 0) & (occurrences < 10))
    assert vocabulary["most_frequent"][0][1] == occurrences.max()
    coverage = np.count_nonzero(occurrences) / 400
    assert stats["thresholds"]["coverage"]["value"] == pytest.approx(coverage)
    assert stats["thresholds"]["round_trip"]["met"]
    assert stats["thresholds"]["decodable"]["met"]
    assert stats["samples"]["val"]["text"] == "".join(stats["samples"]["val"]["tokens"])
    assert (directory / "zipf.png").read_bytes().startswith(b"\x89PNG")


def test_zipf_exponent_of_a_known_law(tmp_path: Path) -> None:
    from thimble.tokens.statistics import _plot_zipf

    frequency = (1e9 * np.arange(1, 5001) ** -1.2).astype(np.int64)
    assert _plot_zipf(tmp_path / "zipf.png", frequency) == pytest.approx(1.2, abs=0.01)


def test_missed_thresholds_are_said(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A tokenizer of other text that also lowers case: long, unused and lossy.
    foreign = train(["Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. " * 50], 300)
    foreign.save(tmp_path / "foreign")
    content = json.loads((tmp_path / "foreign" / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "kernel"}, "content": "K"}
    (tmp_path / "foreign" / "tokenizer.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, logger="thimble"):
        directory = tokens.build(
            corpus, output=tmp_path / "out", tokenizer=tmp_path / "foreign", workers=1
        )
    thresholds = stats_of(directory)["thresholds"]
    for name, words in (
        ("bytes_per_token", "bytes per token"),
        ("coverage", "of the vocabulary occurs in train"),
        ("round_trip", "came back unchanged"),
    ):
        assert not thresholds[name]["met"]
        assert words in caplog.text
    assert stats_of(directory)["round_trip"]["changed"]


def test_nothing_is_said_when_all_is_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        row | {"text": row["text"].encode("ascii", "ignore").decode()} for row in documents(3000)
    ]
    corpus = write_corpus(tmp_path / "corpus", rows, row_group_size=1000)
    with caplog.at_level(logging.WARNING, logger="thimble"):
        directory = tokens.build(corpus, output=tmp_path / "out", vocab_size=1000, workers=1)
    assert load_tokenizer(directory).vocab_size == 1000
    met = {name: value["met"] for name, value in stats_of(directory)["thresholds"].items()}
    assert met["bytes_per_token"]
    assert met["round_trip"]
    assert "bytes per token" not in caplog.text
