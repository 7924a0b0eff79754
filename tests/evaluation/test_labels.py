"""Baselines of labels, and what is too good to be true."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import helpers_recursive as small
from thimble.artifacts import read_json, write_json
from thimble.errors import DataError
from thimble.evaluation.labels import (
    answer_bytes,
    label_baselines,
    pairs,
    probabilities,
    suspicious,
)
from thimble.evaluation.ngrams import discounts

VOCABULARY = 11


def made(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs in which the second depends on the first, which never is 10."""
    draw = np.random.default_rng(seed)
    before = draw.integers(0, VOCABULARY - 1, count)
    return before, (before + draw.integers(0, 3, count) ** 2) % (VOCABULARY - 1)


def test_probabilities_of_every_history_sum_to_one() -> None:
    train = made(200, 1)
    every = np.repeat(np.arange(VOCABULARY), VOCABULARY), np.tile(np.arange(VOCABULARY), VOCABULARY)
    unigram, bigram = probabilities(*train, *every, VOCABULARY)
    assert unigram.min() > 0
    assert bigram.min() > 0
    for p in (unigram, bigram):
        assert p.reshape(VOCABULARY, -1).sum(1) == pytest.approx(np.ones(VOCABULARY))


def test_probabilities_are_the_formula() -> None:
    before, tokens = made(150, 2)
    count = Counter(zip(before.tolist(), tokens.tolist(), strict=True))
    follows = Counter(token for _, token in count)  # distinct predecessors
    often = Counter(tokens.tolist())

    def single(counts: Counter[int], token: int) -> float:
        d = discounts(np.array(list(counts.values())))
        freed = sum(d[min(c, 3)] for c in counts.values())
        own = max(counts[token] - d[min(counts[token], 3)], 0)
        return (own + freed / VOCABULARY) / sum(counts.values())

    def double(history: int, token: int) -> float:
        d = discounts(np.array(list(count.values())))
        mine = {t: c for (h, t), c in count.items() if h == history}
        lower = single(follows, token)
        if not mine:
            return lower
        freed = sum(d[min(c, 3)] for c in mine.values())
        own = max(mine.get(token, 0) - d[min(mine.get(token, 0), 3)], 0)
        return (own + freed * lower) / sum(mine.values())

    histories, wanted = np.array([0, 3, 10, 7, 7]), np.array([1, 10, 2, 7, 8])
    unigram, bigram = probabilities(before, tokens, histories, wanted, VOCABULARY)
    assert unigram == pytest.approx([single(often, int(t)) for t in wanted])
    assert bigram == pytest.approx(
        [double(int(h), int(t)) for h, t in zip(histories, wanted, strict=True)]
    )


def test_pairs_are_the_labels_and_what_stands_before_each() -> None:
    data = small.conversations()
    numbers = data.split("test")
    before, tokens = pairs(data, numbers)
    expected = []
    for number in numbers:
        ids, labels = data.example(int(number))
        expected += [(int(ids[i - 1]), int(ids[i])) for i in np.flatnonzero(labels)]
    assert list(zip(before.tolist(), tokens.tolist(), strict=True)) == expected


def test_baselines_are_of_the_held_out_labels_and_are_kept(tmp_path: Path) -> None:
    data = small.build_conversations(tmp_path, count=60)
    found = label_baselines(data, "test")
    assert found["uniform_nll"] == pytest.approx(math.log(data.vocab_size))
    assert found["bigram_nll"] < found["unigram_nll"] < found["uniform_nll"]
    numbers = data.split("test")
    labels = int(data.examples["labelled"][numbers].sum())
    per_byte = labels / int(answer_bytes(data, numbers).sum()) / math.log(2)
    for name in ("uniform", "unigram", "bigram"):
        assert found[f"{name}_bits_per_byte"] == pytest.approx(found[f"{name}_nll"] * per_byte)
    path = data.directory / "baselines-test.json"
    kept = read_json(path)
    write_json(path, kept | {"figures": {"unigram_nll": 1.0}})
    assert label_baselines(data, "test") == {"unigram_nll": 1.0}  # read, not counted again
    write_json(path, kept | {"key": "of other data"})
    assert label_baselines(data, "test") == found


def test_a_split_without_labels_has_no_baselines(tmp_path: Path) -> None:
    data = small.build_conversations(tmp_path, count=12, test_ratio=0.0)
    with pytest.raises(DataError, match=r"test split .* has no labels"):
        label_baselines(data, "test")


@pytest.mark.parametrize(
    ("exact", "nll", "reasons"), [(0.5, 0.3, 0), (0.51, 2.0, 1), (0.1, 0.29, 1), (0.9, 0.1, 2)]
)
def test_what_is_too_good_is_said_with_what_was_measured(
    exact: float, nll: float, reasons: int
) -> None:
    figures: dict[str, Any] = {"exact_accuracy": exact, "nll": nll}
    checks = small.conversations().checks
    said = suspicious(figures, "conversations", checks)
    assert bool(said) == bool(reasons)
    if said:
        text = "\n".join(said)
        assert text.count("more than 50%") + text.count("less than 0.3") == reasons
        assert f"{checks['copy']['share']:.1%}" in text
        assert f"{small.conversations().vocab_size} entries" in text
        for word in ("tokenizer", "splits", "coverage", "unknown", "in both"):
            assert word in text
        assert len(suspicious(figures, "conversations")) > reasons
    assert suspicious(figures, "puzzles", None) == []
