"""Reach the shares of a mixture by sampling: nothing is repeated, whole groups are kept or left."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from thimble.corpora.extract import Text


def sample(texts, shares, size, seed):
    groups = defaultdict(lambda: defaultdict(list))
    available = defaultdict(int)
    for t in texts:
        n = len(t.text.encode())
        groups[t.category][t.group].append((t, n))
        available[t.category] += n
    total = min(available[c] / s for c, s in shares.items())
    if size: total = min(total, size)
    kept = []
    for c, s in shares.items():
        left = total * s
        for g in sorted(groups[c], key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest()):
            if left <= 0: break
            kept += [t for t, _ in groups[c][g]]
            left -= sum(n for _, n in groups[c][g])
    return sorted(kept, key=lambda t: t.id)
