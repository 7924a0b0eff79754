"""Reach the shares of a mixture by sampling: nothing is repeated, a group is kept or left whole."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from thimble.errors import DataError


def choose(
    groups: Iterable[tuple[str, str, int]],
    shares: Mapping[str, float],
    limit: int | None,
    seed: int,
) -> tuple[dict[str, set[str]], dict[str, int]]:
    """Choose groups so that each category has its share of the bytes.

    ``groups`` are (category, group, bytes), a group any number of times; ``shares`` sum to 1;
    ``limit`` bounds the bytes of the whole, which is otherwise as large as the scarcest category
    allows. Returns the chosen groups and the bytes there were, both by category. The order of the
    input does not matter: groups are taken in the order of a hash of seed and name.
    Raises DataError when a category has nothing.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for category, group, size in groups:
        sizes[category][group] += size
    available = {category: sizes[category].total() for category in shares}
    if empty := [category for category, size in available.items() if not size]:
        raise DataError(
            f"No text is left for {', '.join(empty)}, so the mixture cannot be reached. "
            "See the counts above; the sources of this category are missing or were filtered out."
        )
    total = min(available[category] / share for category, share in shares.items())
    total = min(total, limit) if limit else total
    chosen: dict[str, set[str]] = {}
    for category, share in shares.items():
        left = total * share
        chosen[category] = set()
        for group in sorted(sizes[category], key=lambda name: _order(seed, name)):
            # A group that would overshoot is passed over while a smaller one may still fit.
            if sizes[category][group] <= left:
                chosen[category].add(group)
                left -= sizes[category][group]
    return chosen, available


def _order(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
