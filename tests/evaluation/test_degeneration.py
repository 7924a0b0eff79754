from __future__ import annotations

import argparse
import inspect
import random
import re

import pytest

from thimble.evaluation.degeneration import degeneration, longest_loop


def judge(text: str) -> str | None:
    """With words and signs as tokens."""
    vocabulary: dict[str, int] = {}
    parts = re.findall(r"\w+|\s+|[^\w\s]", text)
    return degeneration(text, [vocabulary.setdefault(part, len(vocabulary)) for part in parts])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("ab\ufffd\ufffdcd", "broken"),
        ("the device " * 30, "repeated"),
        ("A beginning of some words. " + "it is the " * 30, "repeated"),
        ("a b " + "".join(random.Random(0).choices(["a ", "b "], k=60)), "distinct"),
    ],
)
def test_what_has_degenerated_is_named(text: str, problem: str) -> None:
    assert problem in (judge(text) or "")


@pytest.mark.parametrize(
    "text",
    [
        "8086:1234",  # short answers are whole answers
        "no no no",
        "Mounts a file system. Mounts a file system.",
        "\x1b[0m and one broken \ufffd character in a long enough line",
    ],
)
def test_short_or_slightly_odd_text_passes(text: str) -> None:
    assert judge(text) is None


def test_real_text_almost_never_counts_as_degenerate() -> None:
    source = "".join(inspect.getsource(m) for m in (argparse, inspect, random, re))
    windows = [source[i : i + 400] for i in range(0, len(source) - 400, 400)]
    assert len(windows) > 300
    assert sum(judge(window) is not None for window in windows) <= len(windows) // 100


def test_the_longest_loop_is_found_whatever_its_block() -> None:
    for block in (1, 3, 7, 32):
        ids = [1000, 1001, *[i % block for i in range(5 * block)], 1002]
        assert longest_loop(ids) == (5 * block, block)
    assert longest_loop(list(range(50)))[0] == 0
