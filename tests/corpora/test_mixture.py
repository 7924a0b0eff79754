from __future__ import annotations

import random

import pytest

from thimble.corpora.mixture import choose
from thimble.errors import DataError

SHARES = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}


def groups(seed: int = 0) -> list[tuple[str, str, int]]:
    pick = random.Random(seed)
    return [
        (category, f"{category}{n}", pick.randrange(50, 500))
        for category, count in (("a", 900), ("b", 500), ("c", 200), ("d", 300))
        for n in range(count)
    ]


def sizes(chosen: dict[str, set[str]], there: list[tuple[str, str, int]]) -> dict[str, int]:
    return {c: sum(s for k, g, s in there if k == c and g in chosen[c]) for c in chosen}


@pytest.mark.parametrize("limit", [None, 60_000])
def test_shares_are_reached(limit: int | None) -> None:
    there = groups()
    chosen, available = choose(there, SHARES, limit, 1)
    got = sizes(chosen, there)
    total = sum(got.values())
    assert all(abs(got[c] / total - share) < 0.01 for c, share in SHARES.items())
    scarcest = min(available[c] / share for c, share in SHARES.items())
    assert 0.98 * (limit or scarcest) <= total <= (limit or scarcest)


def test_order_does_not_matter_and_the_seed_does() -> None:
    there = groups()
    shuffled = random.Random(1).sample(there, len(there))
    assert choose(there, SHARES, 50_000, 1) == choose(shuffled, SHARES, 50_000, 1)
    assert choose(there, SHARES, 50_000, 1)[0] != choose(there, SHARES, 50_000, 2)[0]


def test_a_group_in_several_parts_counts_whole() -> None:
    there = [("a", "one", 60), ("a", "one", 60), ("a", "two", 30)]
    chosen, available = choose(there, {"a": 1.0}, 100, 1)
    assert chosen == {"a": {"two"}}
    assert available == {"a": 150}


def test_an_empty_category_is_refused() -> None:
    with pytest.raises(DataError, match="No text is left for d"):
        choose([g for g in groups() if g[0] != "d"], SHARES, None, 1)
