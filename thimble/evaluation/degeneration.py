"""Whether generated text has degenerated: empty, broken characters, a loop, too few words.

The thresholds stand well away from what real text does: of windows of 96 tokens from manual pages,
sources and device lists about one in a thousand crosses one, and that is drawn lines and tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

BROKEN_SHARE = 0.1  # of characters that are U+FFFD, the mark of bytes that are no UTF-8
LOOP_SHARE = 0.5  # of the tokens in one block repeated without a break
LOOP_TIMES = 4  # repetitions from which a block counts as a loop
LONGEST_BLOCK = 32  # tokens
DISTINCT_SHARE = 0.25  # distinct pairs of neighbouring tokens, of all pairs
SHORTEST = 24  # tokens; of shorter text neither loops nor distinct pairs say anything


def degeneration(text: str, ids: Sequence[int]) -> str | None:
    """What is wrong with a text, in a few words, or None; ``ids`` are the text's tokens."""
    if not text.strip():
        return "empty"
    broken = text.count("\ufffd") / len(text)
    if broken > BROKEN_SHARE:
        return f"{broken:.0%} broken characters"
    if len(ids) < SHORTEST:
        return None
    length, block = longest_loop(ids)
    if length > LOOP_SHARE * len(ids) and length >= LOOP_TIMES * block:
        return f"{length / len(ids):.0%} of it one block of {block} tokens, repeated"
    distinct = distinct_pairs(ids)
    if distinct < DISTINCT_SHARE:
        return f"only {distinct:.0%} of its pairs of tokens are distinct"
    return None


def longest_loop(ids: Sequence[int]) -> tuple[int, int]:
    """Length in tokens of the longest stretch that is one block repeated, and of that block."""
    best = (0, 1)
    for block in range(1, min(LONGEST_BLOCK, len(ids) // 2) + 1):
        run = 0
        for i in range(block, len(ids)):
            run = run + 1 if ids[i] == ids[i - block] else 0
            if run >= block and run + block > best[0]:
                best = (run + block, block)
    return best


def distinct_pairs(ids: Sequence[int]) -> float:
    """Distinct pairs of neighbouring tokens as a share of all pairs."""
    pairs = list(itertools.pairwise(ids))
    return len(set(pairs)) / max(len(pairs), 1)
