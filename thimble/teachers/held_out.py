"""What a teacher says about held-out text, kept in the folder of its cache: asked once, and then an
evaluation needs no teacher.

Evaluations put their rows together by rules of their own, so a row is found by what is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from thimble import artifacts
from thimble.errors import DataError
from thimble.teachers.asked import Asked, Targets, Teacher
from thimble.teachers.cache import DESCRIPTION, TeacherCache, describe
from thimble.teachers.examples import Examples, Rows
from thimble.teachers.fill import fill
from thimble.tokens.packed import IGNORED

PREFIX = "held-out-"


class HeldOutRows:
    """The rows of an evaluation, each once, as ``Examples``; those of the data ``like``."""

    def __init__(self, like: Examples) -> None:
        self.directory, self.length = like.directory, like.length
        self.vocab_size, self.tokenizer = like.vocab_size, like.tokenizer
        self.places: dict[bytes, int] = {}
        self.kept: list[tuple[np.ndarray, np.ndarray | None]] = []

    def note(self, inputs: Tensor, targets: Tensor, starts: Tensor | None) -> None:
        """Add rows [B, L] that are not there yet, but for what only fills up a batch; ``starts``
        where documents must be apart."""
        counted = (targets != IGNORED).any(-1).tolist()
        for (key, row, begins), counts in zip(_each(inputs, starts), counted, strict=True):
            # A row may be all text and have nothing to predict: of documents that are trained on.
            if (counts or not _filling(row)) and key not in self.places:
                self.places[key] = len(self.kept)
                self.kept.append((row, begins))

    @property
    def count(self) -> int:
        return len(self.kept)

    @property
    def identity(self) -> dict[str, Any]:
        digest = artifacts.sha256_bytes(b"".join(self.places))
        return {"held_out": digest, "length": self.length}

    def rows(self, numbers: Sequence[int] | np.ndarray) -> Rows:
        chosen = [self.kept[number] for number in numbers]
        inputs = np.stack([row for row, _ in chosen])
        begins = [begin for _, begin in chosen if begin is not None]
        starts = np.stack(begins) if begins else None
        return Rows(inputs, np.full_like(inputs, IGNORED), starts)

    def numbers(self, inputs: Tensor, starts: Tensor | None) -> list[int]:
        """The places of rows. Raises DataError for one that is not there; what fills up the last
        batch, the same token everywhere, is any."""
        found = []
        for key, row, _ in _each(inputs, starts):
            if key not in self.places and not _filling(row):
                raise DataError("Held-out text that no teacher was asked about.")
            found.append(self.places.get(key, 0))
        return found


def _filling(row: np.ndarray) -> bool:
    return bool((row == row[0]).all())


def _each(inputs: Tensor, starts: Tensor | None) -> Any:
    rows = np.ascontiguousarray(inputs.cpu().numpy())
    begins = [None] * len(rows) if starts is None else starts.cpu().numpy()
    for row, begin in zip(rows, begins, strict=True):
        yield row.tobytes() + (b"" if begin is None else begin.tobytes()), row, begin


class HeldOutTeacher:
    """The answers of a complete cache of ``rows``, all of its tokens at temperature 1."""

    def __init__(self, cache: TeacherCache, rows: HeldOutRows) -> None:
        self.cache, self.rows, self.asked = cache, rows, cache.asked
        self.identity: dict[str, Any] = cache.description["teacher"]

    def targets(
        self, numbers: Sequence[int], inputs: Tensor, starts: Tensor | None = None
    ) -> Targets:
        """As ``Teacher.targets``; rows are known by their tokens, not by ``numbers``."""
        return self.cache.read(self.rows.numbers(inputs, starts), inputs.device)


def find(
    folder: str | Path, rows: HeldOutRows, asked: Asked, teacher: Mapping[str, Any] | None
) -> HeldOutTeacher | None:
    """Of what is kept in the folder of a cache, that with the most tokens that is of this teacher
    (None: of any), of these rows and complete; None without."""
    wanted = describe(rows, None if teacher is None else dict(teacher), asked)
    best: TeacherCache | None = None
    for path in sorted(Path(folder).glob(f"{PREFIX}*/{DESCRIPTION}")):
        if not (path.parent / artifacts.MANIFEST).is_file():
            continue
        cache = TeacherCache(path.parent)
        try:
            cache.check(wanted)
        except DataError:
            continue
        if best is None or cache.asked.k > best.asked.k:
            best = cache
    return None if best is None else HeldOutTeacher(best, rows)


def keep(folder: str | Path, rows: HeldOutRows, teacher: Teacher) -> Path:
    """Ask the teacher about all of ``rows`` and keep it in the folder of its cache. Of several runs
    that read the cache the first does so, and the others wait for it."""
    precision = getattr(teacher, "precision", None)
    name = artifacts.fingerprint(describe(rows, teacher.identity, teacher.asked, precision))
    return fill(Path(folder) / f"{PREFIX}{name}", rows, teacher, wait=True).path
