from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from thimble.evaluation import ngrams
from thimble.evaluation.ngrams import NgramModel, discounts


def stream(size: int = 4000, vocabulary: int = 12, seed: int = 0) -> np.ndarray:
    """Text with structure: each token depends on the two before it, with noise."""
    draw = np.random.default_rng(seed)
    ids = [0, 1]
    for _ in range(size - 2):
        likely = (3 * ids[-1] + ids[-2]) % vocabulary
        ids.append(likely if draw.random() < 0.6 else int(draw.zipf(1.6)) % vocabulary)
    return np.asarray(ids, dtype=np.uint16)


def slow_probability(train: list[int], order: int, vocabulary: int, history: list[int], w: int):
    """The formula written down with dictionaries, one word at a time."""
    size = len(train)

    def grams(n: int) -> Counter[tuple[int, ...]]:
        return Counter(tuple(train[(i + j) % size] for j in range(n)) for i in range(size))

    p = 1 / vocabulary
    for n in range(1, order + 1):
        k = grams(n)
        if n < order:
            k = Counter(gram[1:] for gram in grams(n + 1))
        d = discounts(np.array(list(k.values())))
        h = tuple(history[len(history) - (n - 1) :])
        following = {gram: count for gram, count in k.items() if gram[:-1] == h}
        if not following:
            break
        own = k[(*h, w)]
        freed = sum(d[min(count, 3)] for count in following.values())
        p = (max(own - d[min(own, 3)], 0) + freed * p) / sum(following.values())
    return p


def test_two_symbols_by_hand() -> None:
    # The circle a a b: unigrams a:2 b:1, bigrams aa ab ba once each; discounts 0.5, 1, 1.5.
    model = NgramModel(np.array([0, 0, 1]), 2, 2)
    p = model.probabilities(np.array([0, 1]), 0, (1, 2))
    # Order 1: p(a) = (2 - 1 + 1.5/2) / 3, p(b) = (1 - 0.5 + 1.5/2) / 3.
    assert p[1].tolist() == pytest.approx([1.75 / 3, 1.25 / 3])
    # Below the highest order predecessors count: a follows a and b (2), b follows a (1): the same.
    # p(a | a) = (1 - 0.5 + (0.5 + 0.5) p(a)) / 2 and p(b | a) alike.
    assert p[2].tolist() == pytest.approx([(0.5 + 1.75 / 3) / 2, (0.5 + 1.25 / 3) / 2])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_formula_written_slowly(order: int) -> None:
    train, held_out = stream(300), stream(60, seed=1)
    found = NgramModel(train, 5 if order == 5 else order, 12).probabilities(held_out, 7, (order,))
    padded = [7] * 5 + held_out.tolist()
    for i in range(0, 60, 3):
        wanted = slow_probability(train.tolist(), order, 12, padded[: i + 5], padded[i + 5])
        assert found[order][i] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one_after_any_history(order: int) -> None:
    model = NgramModel(stream(), 5, 13)  # 12 is never seen
    draw = np.random.default_rng(3)
    seen = stream()
    for trial in range(40):
        history = draw.integers(0, 13, 4) if trial % 2 else seen[trial * 50 : trial * 50 + 4]
        every = np.concatenate([[*history, w] for w in range(13)])
        p = model.probabilities(every, 0, (order,))[order][4::5]
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_more_context_helps_where_the_text_has_structure() -> None:
    bits = NgramModel(stream(40_000), 5, 12).bits(stream(4000, seed=5), 0, (1, 2, 5))
    assert bits[1] > bits[2] * 1.02
    assert bits[2] > bits[5] * 1.05


def test_a_model_of_two_orders_is_the_same_inside_one_of_five() -> None:
    held_out = stream(500, seed=2)
    five = NgramModel(stream(), 5, 12).bits(held_out, 0, (1, 2, 5))
    assert NgramModel(stream(), 2, 12).bits(held_out, 0, (2,))[2] == five[2]


def test_large_codes_take_the_other_sort_and_give_the_same() -> None:
    values = np.random.default_rng(0).integers(0, 50, 1000)
    small = ngrams._distinct(values)
    large = ngrams._distinct(values + (1 << 60))
    assert (large[0] - (1 << 60)).tolist() == small[0].tolist()
    for a, b in zip(small[1:], large[1:], strict=True):
        assert a.tolist() == b.tolist()
    unique, counts = np.unique(values, return_counts=True)
    assert small[0].tolist() == unique.tolist()
    assert small[1].tolist() == counts.tolist()
    assert small[0][small[3]].tolist() == values.tolist()
    assert values[small[2]].tolist() == unique.tolist()
