"""Which document goes into train, val or test: 90/5/5 by bytes, no group and no text in two.

Documents of one ``group`` stay together, and so do documents whose text is the same up to case and
whitespace. Within each source the groups are ranked by the hash of their name; the first ranks make
up test, the next val, the rest train. So adding documents to a corpus moves few of the old ones,
and each source that has enough groups is held out in its share.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from thimble.console import log
from thimble.errors import DataError

TRAIN, VAL, TEST = 0, 1, 2
HELD_OUT = 0.05  # of the bytes, for val and for test each
ACCEPTED = (0.4 * HELD_OUT, 2 * HELD_OUT)  # what is still called 90/5/5 of the whole corpus


def hash64(text: str) -> int:
    """A 64-bit hash that is the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def normalized(text: str) -> str:
    """Equal for texts that are equal up to case and whitespace."""
    return " ".join(text.lower().split())


def text_hash(text: str) -> int:
    return hash64(normalized(text))


@dataclass
class Documents:
    """What the split needs of each document, in corpus order: 28 bytes each, never the text."""

    group: np.ndarray  # uint64 [N], hash of the group's name
    text: np.ndarray  # uint64 [N], hash of the normalised text
    source: np.ndarray  # int32 [N]
    bytes: np.ndarray  # int64 [N]

    def __len__(self) -> int:
        return len(self.bytes)


@dataclass
class Plan:
    split: np.ndarray  # uint8 [N]; of a document that is cut, where its first piece goes
    cuts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """document -> [(byte offset, split)]: after the line with that byte begins that split"""
    merged: int = 0  # documents whose text another group also has


def plan(documents: Documents) -> Plan:
    """Assign every document. Raises DataError when the text is too little for three splits."""
    group, merged = merge_equal_texts(documents)
    if merged:
        log.info("%s documents have the text of another; they stay in its split", f"{merged:,}")
    for strata in (documents.source, np.zeros_like(documents.source)):
        split = _by_rank(group, strata, documents.bytes)
        if _is_accepted(split, documents.bytes):
            return Plan(split, merged=merged)
    return _contiguous(documents, merged)


def _is_accepted(split: np.ndarray, size: np.ndarray) -> bool:
    shares = np.bincount(split, weights=size, minlength=3) / max(size.sum(), 1)
    return all(ACCEPTED[0] <= shares[which] <= ACCEPTED[1] for which in (VAL, TEST))


def merge_equal_texts(documents: Documents) -> tuple[np.ndarray, int]:
    """Group names in which groups that share a text have become one."""
    order = np.argsort(documents.text, kind="stable")
    text, group = documents.text[order], documents.group[order]
    again = np.flatnonzero((text[1:] == text[:-1]) & (group[1:] != group[:-1]))
    if not len(again):
        return documents.group, 0
    parent: dict[int, int] = {}

    def root(name: int) -> int:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for index in again:
        first, second = sorted((root(int(group[index])), root(int(group[index + 1]))))
        parent[second] = first
    names = np.array(list(parent), dtype=np.uint64)
    roots = np.array([root(int(name)) for name in names], dtype=np.uint64)
    by_name = np.argsort(names)
    names, roots = names[by_name], roots[by_name]
    place = np.minimum(np.searchsorted(names, documents.group), len(names) - 1)
    found = names[place] == documents.group
    return np.where(found, roots[place], documents.group), len(again)


def _by_rank(group: np.ndarray, strata: np.ndarray, size: np.ndarray) -> np.ndarray:
    names, first, member = np.unique(group, return_index=True, return_inverse=True)
    group_bytes = np.bincount(member, weights=size)
    stratum = strata[first]  # a group that spans sources counts for that of its first document
    group_split = np.zeros(len(names), dtype=np.uint8)
    for which in np.unique(stratum):
        members = np.flatnonzero(stratum == which)  # np.unique sorted them by hash: by rank
        share = HELD_OUT * group_bytes[members].sum()
        # A group that would overshoot its share by more than half of it can only be trained on.
        members = members[group_bytes[members] <= 2 * share]
        begin = 0
        for held_out in (TEST, VAL):
            filled = np.cumsum(group_bytes[members[begin:]])
            # Round to the nearest: the last group is in when its middle is.
            count = int(np.sum(filled - group_bytes[members[begin:]] / 2 <= share))
            group_split[members[begin : begin + count]] = held_out
            begin += count
    return group_split[member]


def _contiguous(documents: Documents, merged: int) -> Plan:
    """The fallback for a few long groups, such as one file: its beginning, middle and end."""
    total = int(documents.bytes.sum())
    ends = np.cumsum(documents.bytes)
    starts = ends - documents.bytes
    boundaries = [(round(total * (1 - 2 * HELD_OUT)), VAL), (round(total * (1 - HELD_OUT)), TEST)]
    split = np.zeros(len(documents), dtype=np.uint8)
    cuts: dict[int, list[tuple[int, int]]] = {}
    for boundary, which in boundaries:
        split[starts >= boundary] = which
        for index in np.flatnonzero((starts < boundary) & (boundary < ends)):
            cuts.setdefault(int(index), []).append((boundary - int(starts[index]), which))
    if total < 2000:
        raise DataError(
            f"The corpus holds {total:,} bytes of text, too little to hold out 5 % for validation "
            "and 5 % for test. Add text; 200 kB is a good beginning."
        )
    log.warning(
        "the corpus has too few independent documents to hold out 5 %% of them: its last tenth "
        "becomes val and test instead, which continues what was trained on and so looks easier"
    )
    return Plan(split, cuts, merged)


def pieces(text: str, first: int, cuts: list[tuple[int, int]]) -> list[tuple[int, str]]:
    """``text`` as [(split, piece)]: cut at the line's end after each offset (in bytes)."""
    data = text.encode()
    found, begin, current = [], 0, first
    for offset, split in cuts:
        end = data.find(b"\n", max(offset - 1, begin))
        if end < 0 or end + 1 >= len(data):  # one line to the end: cut between characters
            end = offset - 1
            while end + 1 < len(data) and data[end + 1] & 0xC0 == 0x80:
                end += 1
        found.append((current, data[begin : end + 1].decode()))
        begin, current = end + 1, split
    found.append((current, data[begin:].decode()))
    return [(split, piece) for split, piece in found if piece]
