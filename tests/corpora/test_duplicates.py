from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from thimble.corpora import duplicates
from thimble.corpora.duplicates import MINHASH, Signatures, word_hashes


def words_of(text: str) -> list[str]:
    return [word.decode() for word in re.findall(rb"[A-Za-z0-9_\x80-\xff]+", text.encode())]


def test_word_hashes_are_equal_exactly_for_equal_words() -> None:
    text = "the kernel, the driver_2; naïve/kernel (the) x xx xxx kernel2"
    words = words_of(text)
    hashes = word_hashes(np.frombuffer(text.encode(), np.uint8)).tolist()
    assert len(hashes) == len(words)
    for word, value in zip(words, hashes, strict=True):
        for other, theirs in zip(words, hashes, strict=True):
            assert (word == other) == (value == theirs)
    assert len(word_hashes(np.frombuffer(b" .,", np.uint8))) == 0


def test_shingles_do_not_depend_on_place_case_or_spacing(tmp_path: Path) -> None:
    step = Signatures(str(tmp_path))
    a = set(step.get_shingles("one two three four five six")[:, 0].tolist())
    b = set(step.get_shingles("zero  ONE two,\n\tthree four five six")[:, 0].tolist())
    assert len(a) == 2
    assert a < b
    assert step.get_shingles("one two three four").shape == (0, 1)


def test_signatures_estimate_the_jaccard_index(tmp_path: Path) -> None:
    """Equal hashes happen as often as runs are shared, and buckets match as theory says."""
    step, choose = Signatures(str(tmp_path)), random.Random(1)
    vocabulary = [f"w{n}" for n in range(5000)]
    true, estimated, found, expected = [], [], 0, 0.0
    for _ in range(80):
        words = choose.choices(vocabulary, k=300)
        keep = choose.uniform(0.9, 1.0)
        changed = [w if choose.random() < keep else choose.choice(vocabulary) for w in words]
        a, b = (step.get_shingles(" ".join(one)) for one in (words, changed))
        sa, sb = set(a[:, 0].tolist()), set(b[:, 0].tolist())
        jaccard = len(sa & sb) / len(sa | sb)
        x, y = step.get_signature(a), step.get_signature(b)
        true.append(jaccard)
        estimated.append(np.mean(np.concatenate(x) == np.concatenate(y)))
        found += any(p == q for p, q in zip(x, y, strict=True))
        expected += 1 - (1 - jaccard**MINHASH.hashes_per_bucket) ** MINHASH.num_buckets
    error = np.array(estimated) - np.array(true)
    assert abs(error.mean()) < 0.02
    assert np.abs(error).max() < 0.2
    assert abs(found - expected) < 10


def test_signature_of_a_book_equals_that_of_its_slices(tmp_path: Path) -> None:
    step = Signatures(str(tmp_path))
    runs = np.random.default_rng(0).integers(0, 1 << 63, (5000, 1)).astype(np.uint64)
    whole = np.concatenate(step.get_signature(runs))
    halves = [np.concatenate(step.get_signature(part)) for part in np.split(runs, 2)]
    assert (whole == np.minimum(*halves)).all()


def test_long_texts_are_hashed_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{n}" for n in range(2000))
    step = Signatures(str(tmp_path))
    whole = set(step.get_shingles(text)[:, 0].tolist())
    monkeypatch.setattr(duplicates, "SLICE", 4096)
    sliced = set(step.get_shingles(text)[:, 0].tolist())
    assert len(whole & sliced) > 0.97 * len(whole)
