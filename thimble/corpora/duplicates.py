"""Exact and near-duplicates: what an earlier document already says is left out, and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from thimble.corpora.recipe import QA
from thimble.corpora.steps import Documents, Step, digest


class NotSeen(Step):
    """Keep the first of equal documents, in the order of shards."""

    name = "exact duplicates"
    why = "equal to an earlier document up to case and white space"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.seen: set[bytes] = set()
        for earlier in range(rank):
            digests = (Path(self.folder) / f"{earlier:05d}.digests").read_bytes()
            self.seen.update(digests[at : at + 16] for at in range(0, len(digests), 16))
        yield from super().run(data, rank, world_size)

    def change(self, document: Document) -> Iterator[Document]:
        key = digest(document.text)
        if key not in self.seen:
            self.seen.add(key)
            yield document


class NoWords(WordTokenizer):
    """Stands in for datatrove's English tokenizer, which wants a model from the net; not used."""

    def word_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    sent_tokenize = span_tokenize = word_tokenize


# 14 buckets of 8 hashes over runs of 5 words: two documents that share 72 % of these runs are
# found with even chance, 80 % with 92 %. sha1 is in the standard library; xxhash need not be.
MINHASH = MinhashConfig(
    n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(hash_fc="sha1")
)
MULTIPLIERS = np.array(
    [
        int.from_bytes(hashlib.blake2b(bytes([index]), digest_size=8).digest(), "little") | 1
        for index in range(MINHASH.num_buckets * MINHASH.hashes_per_bucket)
    ],
    dtype=np.uint64,
)
# A word is hashed as a polynomial of its bytes, so that prefix sums give all words at once.
BASE = 0x9E3779B97F4A7C15
SLICE = 1 << 20
POWERS = np.cumprod(np.full(SLICE, BASE, np.uint64))
INVERSES = np.cumprod(np.full(SLICE, pow(BASE, -1, 1 << 64), np.uint64))
IN_WORD = np.array([chr(b).isalnum() or b == ord("_") or b > 127 for b in range(256)])


def mixed(values: np.ndarray) -> np.ndarray:
    """Spread every bit over the whole number (a finalizer of xor-shifts and multiplications)."""
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(32))


def word_hashes(data: np.ndarray) -> np.ndarray:
    """64-bit hashes of the words in UTF-8 bytes, in their order; shape [words]."""
    inside = np.concatenate(([False], IN_WORD[data], [False]))
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    terms = (data.astype(np.uint64) + np.uint64(1)) * POWERS[: len(data)]
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(terms)))
    return mixed((sums[ends] - sums[starts]) * INVERSES[starts])


class Signatures(MinhashDedupSignature):
    """datatrove's signatures, with all hashing over arrays: ten times its speed, constant memory.

    Questions carry no signature: they share their wording by design, and their facts differ in a
    number or a name.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, config=MINHASH, language=NoWords())

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        super().run(
            (doc if doc.metadata["category"] != QA else Document("", doc.id) for doc in data),
            rank,
            world_size,
        )

    def get_shingles(self, text: str) -> np.ndarray:
        """64-bit hashes of all runs of five words, case aside; shape [N, 1].

        Runs that cross a border between slices of a megabyte are not seen.
        """
        data = np.frombuffer(text.lower().encode(), np.uint8)
        found = []
        for start in range(0, len(data), SLICE):
            words = word_hashes(data[start : start + SLICE])
            count = len(words) - self.config.n_grams + 1
            if count > 0:
                runs = np.zeros(count, np.uint64)
                for offset in range(self.config.n_grams):
                    runs += words[offset : offset + count] * POWERS[offset]
                found.append(mixed(runs))
        return np.concatenate([np.empty(0, np.uint64), *found]).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """The least of each hash over the runs, bucket by bucket.

        A run's hash is its product with an odd number, modulo 2^64: runs are hashes already, so
        one multiplication mixes enough (datatrove's has eight operations). In slices, so that a
        book needs no gigabytes.
        """
        least = np.full(len(MULTIPLIERS), np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(shingles), 2048):
            products = MULTIPLIERS[:, None] * shingles[None, start : start + 2048, 0]
            np.minimum(least, products.min(axis=1), out=least)
        return [part.tolist() for part in np.split(least, self.config.num_buckets)]
