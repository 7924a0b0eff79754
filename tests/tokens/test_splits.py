"""90/5/5 in every source, nothing that belongs together in two splits, every byte in one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from thimble.errors import DataError
from thimble.tokens import splits
from thimble.tokens.splits import TEST, TRAIN, VAL, Documents, hash64, text_hash


def made(rows: list[tuple[str, str, int, int]]) -> Documents:
    """From (group, text, source, bytes)."""
    return Documents(
        np.array([hash64(row[0]) for row in rows], dtype=np.uint64),
        np.array([text_hash(row[1]) for row in rows], dtype=np.uint64),
        np.array([row[2] for row in rows], dtype=np.int32),
        np.array([row[3] for row in rows], dtype=np.int64),
    )


def many(count: int, seed: int = 1) -> list[tuple[str, str, int, int]]:
    rng = random.Random(seed)
    return [
        (f"group {i // 4}", f"text {i}", rng.choice([0, 0, 0, 1, 1, 2]), rng.randint(50, 5000))
        for i in range(count)
    ]


def shares(documents: Documents, split: np.ndarray, source: int) -> np.ndarray:
    mine = documents.source == source
    return np.bincount(split[mine], documents.bytes[mine], 3) / documents.bytes[mine].sum()


def test_every_source_is_split_90_5_5() -> None:
    documents = made([(f"g{i}", f"t{i}", i % 3, 100 + i) for i in range(2700)])
    plan = splits.plan(documents)
    assert not plan.cuts
    for source in range(3):
        np.testing.assert_allclose(
            shares(documents, plan.split, source), [0.9, 0.05, 0.05], atol=0.003
        )


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_also_across_sources(seed: int) -> None:
    documents = made(many(4000, seed))
    plan = splits.plan(documents)
    assert {TRAIN, VAL, TEST} == set(plan.split.tolist())
    for group in np.unique(documents.group):
        assert len(set(plan.split[documents.group == group].tolist())) == 1


def test_equal_texts_stay_together_also_in_chains() -> None:
    rows = many(3000)
    # Each group shares a text with the next one, up to case and whitespace: one long chain.
    chained = [
        (group, (f"  Chain   LINK {i // 8}\n" if i % 8 in (0, 4) else text), source, size)
        for i, (group, text, source, size) in enumerate(rows[:80])
    ]
    documents = made(chained + rows[80:])
    plan = splits.plan(documents)
    assert plan.merged == 10
    for text in np.unique(documents.text):
        assert len(set(plan.split[documents.text == text].tolist())) == 1
    for group in np.unique(documents.group):
        assert len(set(plan.split[documents.group == group].tolist())) == 1


def test_few_documents_move_when_some_are_added() -> None:
    rows = [(f"g{i}", f"t{i}", 0, 1000) for i in range(2200)]
    before = splits.plan(made(rows[:2000])).split
    after = splits.plan(made(rows)).split[:2000]
    assert (before != after).mean() < 0.03


def test_the_order_of_the_documents_does_not_matter() -> None:
    rows = many(2000)
    rows = [(group, text, 0, size) for group, text, _, size in rows]
    order = random.Random(5).sample(range(2000), 2000)
    assert np.array_equal(
        splits.plan(made(rows)).split[order], splits.plan(made([rows[i] for i in order])).split
    )


def test_many_small_sources_are_held_out_together() -> None:
    documents = made([(f"g{i}", f"t{i}", i // 3, 1000) for i in range(300)])
    plan = splits.plan(documents)
    held_out = np.bincount(plan.split, minlength=3) / 300
    np.testing.assert_allclose(held_out, [0.9, 0.05, 0.05], atol=0.01)


def test_one_large_group_is_trained_on_and_does_not_keep_others_from_being_held_out() -> None:
    rows = [(f"g{i}", f"t{i}", 0, 1000) for i in range(700)]
    lowest = min(hash64(row[0]) for row in rows)
    first = next(name for name in map(str, range(10**6)) if hash64(name) < lowest)  # of all ranks
    documents = made([*rows, (first, "long", 0, 300_000)])
    plan = splits.plan(documents)
    assert not plan.cuts
    assert plan.split[-1] == TRAIN
    np.testing.assert_allclose(shares(documents, plan.split, 0), [0.9, 0.05, 0.05], atol=0.003)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_one_file_is_cut_at_lines(parts: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(parts)
    lines = [f"{rng.choice('é漢a') * rng.randint(0, 60)}\n" for _ in range(4000)]
    texts = ["".join(lines[part::parts]) for part in range(parts)]
    documents = made([("file", text, 0, len(text.encode())) for text in texts])
    plan = splits.plan(documents)
    assert "too few independent documents" in caplog.text
    size = [0, 0, 0]
    for index, text in enumerate(texts):
        found = splits.pieces(text, int(plan.split[index]), plan.cuts.get(index, []))
        assert "".join(piece for _, piece in found) == text
        assert all(piece.endswith("\n") for _, piece in found)
        assert [split for split, _ in found] == sorted(split for split, _ in found)
        for split, piece in found:
            size[split] += len(piece.encode())
    np.testing.assert_allclose(np.array(size) / sum(size), [0.9, 0.05, 0.05], atol=0.01)


@pytest.mark.parametrize(
    "text", ["漢" * 3000 + "a", "a" * 5000 + "\n", "\n" * 4000, "ab\n" * 1000 + "é" * 999]
)
def test_text_without_usable_lines_is_cut_between_characters(text: str) -> None:
    plan = splits.plan(made([("file", text, 0, len(text.encode()))]))
    found = splits.pieces(text, int(plan.split[0]), plan.cuts[0])
    assert "".join(piece for _, piece in found) == text
    assert [split for split, _ in found] == [TRAIN, VAL, TEST]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="1,500 bytes"):
        splits.plan(made([("a", "b", 0, 1500)]))
