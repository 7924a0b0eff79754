"""What a teacher said, kept on disk by row number: asked once, read in every epoch and every sweep.

A row's L positions take the same number of bytes each, so the row of number n is found without any
table. A shard is one flat file of rows, read through a memory map. Row by row:

    log_tail   [L, M] float32   logarithm of the tail's mass, one for each temperature
    indices    [L, K] uint16    uint32 where the vocabulary has more than 65,536 entries
    log_probs  [L, K] float16   at temperature 1; of draws, at theirs

float16 keeps eleven binary digits: a log probability is off by at most 2^-11 of itself. The tails,
from which the normalisers follow, are exact to float32. Draws have no tail and weigh 1 / K.

``rows.index`` has eight bytes for each row: zero until it is written, then a mark and the row's
crc32, put there after the row. So a process may be killed at any moment, rows may come in any order
and from several processes, and what a power cut tore apart is noticed when it is read.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thimble import artifacts
from thimble.errors import DataError, EnvironmentProblem, disk_problem
from thimble.objectives.sparse_targets import SampledTargets, SparseTargets
from thimble.teachers.asked import Asked, Targets, Teacher, narrowed
from thimble.teachers.examples import Examples
from thimble.tokens.shards import dtype_for

KIND = "teacher-cache"
MAKE = "thimble teacher cache TEACHER TOKENS"
DESCRIPTION, INDEX = "cache.json", "rows.index"
SHARD_BYTES = 1 << 30
WRITTEN = 1 << 32  # above the crc32
FORMAT = 1


class TeacherCache:
    """The targets of ``count`` rows of ``length`` positions, some or all of them there.

    ``description`` is ``cache.json``: teacher, tokenizer, what was asked, data, layout.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / DESCRIPTION).is_file():
            raise DataError(
                f"There is no teacher cache at {directory}: it has no {DESCRIPTION}. Make it "
                f"with:\n  {MAKE} -o {directory}"
            )
        said = artifacts.read_json(self.directory / DESCRIPTION)
        try:
            if said["kind"] != KIND or said["format"] != FORMAT:
                raise ValueError(f"it is a {said['kind']} of format {said['format']}")
            asked = said["asked"]
            self.asked = Asked(
                asked["k"],
                tuple(asked["temperatures"]),
                asked["kind"] == "drawn",
                asked.get("seed", 1),
            )
            self.count, self.length = int(said["count"]), int(said["length"])
            self.rows_per_shard = int(said["rows_per_shard"])
            self.dtype = dtype_for(said["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.directory / DESCRIPTION} is not the description of a cache: {error}. Make "
                f"the cache again with:\n  {MAKE} -o {directory}"
            ) from error
        self.description: dict[str, Any] = said
        self.position_bytes = position_bytes(self.asked, said["vocab_size"])
        self.row_bytes = self.length * self.position_bytes
        self._maps: dict[int, np.memmap] = {}
        self._files: dict[int, int] = {}
        index = self.directory / INDEX
        if not index.is_file() or index.stat().st_size != 8 * self.count:
            raise DataError(
                f"{index} is missing or cut off, so nobody knows what is there. Remove the folder "
                f"and make the cache again with:\n  {MAKE} -o {directory}"
            )
        self.index = np.memmap(index, dtype="<u8", mode="r+", shape=(self.count,))

    @classmethod
    def create(
        cls,
        directory: str | Path,
        examples: Examples,
        teacher: dict[str, Any],
        asked: Asked,
        made_by: dict[str, Any] | None = None,
        *,
        precision: str | None = None,
        rows: int | None = None,
    ) -> TeacherCache:
        """An empty cache, or the one that is there already for the very same.

        ``teacher`` is the identity of one, which computes in ``precision``; ``made_by`` is for
        people to read; ``rows``: how many will be written, if not all. Raises DataError when
        another cache, or something else, stands there; EnvironmentProblem when the disk has too
        little room for them.
        """
        directory = Path(directory)
        description = describe(examples, teacher, asked, precision)
        # Listed first: another process of the same run may make the cache at this moment.
        there = list(directory.iterdir()) if directory.is_dir() else []
        if (directory / DESCRIPTION).is_file():
            cache = cls(directory)
            cache.check(description, exactly=True)
            return cache
        # In the folder there may be others with caches.
        files = {path.name for path in there if not path.is_dir()} - {INDEX}
        if any(not name.startswith(".") for name in files):
            raise DataError(f"{directory} is not empty and not a teacher cache. Choose another.")
        size = position_bytes(asked, examples.vocab_size) * examples.length
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        needed = size * (examples.count if rows is None else rows)
        if needed > free:
            raise EnvironmentProblem(
                f"The cache takes {needed / 2**30:.1f} GiB, {directory} has {free / 2**30:.1f} "
                "GiB free. Ask for fewer tokens a position, or choose another disk."
            )
        # Made long, not replaced: another process of the same run may have its marks in it already.
        with open(directory / INDEX, "ab") as index:
            index.truncate(8 * examples.count)
        layout = {"rows_per_shard": max(1, SHARD_BYTES // size), "row_bytes": size}
        artifacts.write_json(
            directory / DESCRIPTION,
            {"kind": KIND, "format": FORMAT, **description, **layout, "made_by": made_by or {}},
        )
        return cls(directory)

    def check(self, wanted: dict[str, Any], *, exactly: bool = False) -> None:
        """Raise DataError where this is not what ``describe`` says is wanted, naming what differs.

        Unless ``exactly``, as for what is added to it, more tokens or temperatures than wanted will
        do, another seed and another precision; and a teacher of None is any.
        """
        found, differs = self.description, []
        keys = (
            ("teacher", "of another teacher or adapter"),
            ("tokenizer", "of another tokenizer"),
            ("vocab_size", "of another vocabulary"),
            ("data", "of other data, another split or another row length"),
            ("count", "of another number of rows"),
            ("length", "of rows of another length"),
        )
        for key, name in (*keys, *([("precision", "of another precision")] if exactly else [])):
            if found.get(key) != wanted[key] and not (key == "teacher" and wanted[key] is None):
                differs.append(f"it is {name} ({found.get(key)}, not {wanted[key]})")
        have, want = found["asked"], wanted["asked"]
        enough = have["kind"] == want["kind"] and have["k"] >= want["k"]
        enough = enough and set(want["temperatures"]) <= set(have["temperatures"])
        if (have != want) if exactly else not enough:
            differs.append(f"it holds {have}, not {want}")
        if differs:
            raise DataError(
                f"The cache {self.directory} does not belong here: {'; '.join(differs)}. Make one "
                f"that does with:\n  {MAKE} -o ANOTHER_FOLDER"
            )

    def filled(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Whether each of these rows has been written: bool [B]."""
        return self.index[np.asarray(numbers, dtype=np.int64)] >= WRITTEN

    def write(self, numbers: Sequence[int] | np.ndarray, targets: Targets) -> None:
        """Keep the targets [B, L, K] of rows. A full disk is an EnvironmentProblem."""
        parts = [targets.indices.cpu().numpy().astype(self.dtype)]
        log_probs = targets.log_probs.float().cpu().numpy()
        parts.append(np.maximum(log_probs, np.finfo(np.float16).min).astype("<f2"))
        if isinstance(targets, SparseTargets):
            parts.insert(0, targets.log_tail.float().cpu().numpy().astype("<f4"))
        for place, number in enumerate(np.asarray(numbers, dtype=np.int64)):
            data = b"".join(part[place].tobytes() for part in parts)
            assert len(data) == self.row_bytes
            shard, row = divmod(int(number), self.rows_per_shard)
            try:
                file = self._file(shard)
                at = row * self.row_bytes
                written = 0
                while written < len(data):
                    written += os.pwrite(file, data[written:], at + written)
            except OSError as error:
                raise disk_problem(error, self.directory) from error
            self.index[number] = WRITTEN | zlib.crc32(data)

    def read(
        self, numbers: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> Targets:
        """The targets [B, L, K] of rows.

        Raises DataError for a row that is not there yet, and for one that is damaged.
        """
        rows = np.asarray(numbers, dtype=np.int64)
        block = np.empty((len(rows), self.row_bytes), dtype=np.uint8)
        for place, number in enumerate(rows):
            shard, row = divmod(int(number), self.rows_per_shard)
            mark = int(self.index[number])
            if mark < WRITTEN:
                raise DataError(
                    f"Row {number} is not in the cache {self.directory} yet: "
                    f"{int((self.index >= WRITTEN).sum()):,} of {self.count:,} are. Complete it "
                    f"with:\n  {MAKE} -o {self.directory}"
                )
            block[place] = self._map(shard)[row]
            if mark != WRITTEN | zlib.crc32(block[place]):
                raise DataError(
                    f"Row {number} in {self._path(shard)} is damaged: its checksum is not that of "
                    f"the index. What is damaged is asked again with:\n"
                    f"  {MAKE} -o {self.directory}"
                )
        k, length = self.asked.k, self.length
        tails = 0 if self.asked.sampled else len(self.asked.temperatures)
        cuts = np.cumsum([4 * tails * length, self.dtype.itemsize * k * length])
        tail, index, logs = np.split(block, cuts, axis=1)
        # int32 travels at half the size; the ids are below 2^31, so that uint32 is read as it.
        ids = np.ascontiguousarray(index).view(self.dtype)
        wide = ids.view(np.int32) if ids.itemsize == 4 else ids.astype(np.int32)
        indices = _tensor(wide, (length, k), device).long()
        log_probs = _tensor(logs.view("<f2"), (length, k), device).float()
        if self.asked.sampled:
            weights = torch.full_like(log_probs, 1 / k)
            return SampledTargets(indices, weights, log_probs, self.asked.temperatures[0])
        log_tail = _tensor(tail.view("<f4"), (length, tails), device)
        return SparseTargets(indices, log_probs, log_tail, self.asked.temperatures)

    def forget_damaged(self) -> int:
        """Take the mark from rows whose bytes are not those written; returns how many."""
        damaged = 0
        for number in np.flatnonzero(self.index >= WRITTEN):
            try:
                self.read([int(number)])
            except DataError:
                self.index[number] = 0
                damaged += 1
        return damaged

    def sync(self) -> None:
        """What has been written is on the disk, rows before their marks."""
        for file in self._files.values():
            os.fsync(file)
        self.index.flush()

    def seal(self) -> dict[str, Any]:
        """All rows are there: write the manifest that says so."""
        assert (self.index >= WRITTEN).all()
        self.sync()
        said = self.description
        mine = [DESCRIPTION, INDEX, *(self._path(n).name for n in range(self._shards))]
        paths = [self.directory / name for name in mine]
        return artifacts.write_manifest(
            self.directory,
            KIND,
            inputs={key: said[key] for key in ("teacher", "tokenizer", "data")},
            options=said["asked"],
            counts={
                "rows": self.count,
                "positions": self.count * self.length,
                "bytes_per_position": self.position_bytes,
            },
            packages=("torch", "transformers"),
            files={
                path.name: {"bytes": path.stat().st_size, "sha256": artifacts.sha256_file(path)}
                for path in paths
            },
            made_by=said["made_by"],
        )

    @property
    def _shards(self) -> int:
        return -(-self.count // self.rows_per_shard)

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:05d}.bin"

    def _rows(self, shard: int) -> int:
        return min(self.rows_per_shard, self.count - shard * self.rows_per_shard)

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            file = os.open(self._path(shard), os.O_RDWR | os.O_CREAT, 0o644)
            size = self._rows(shard) * self.row_bytes
            if os.fstat(file).st_size != size:
                os.ftruncate(file, size)  # a hole until it is written: no disk is taken
            self._files[shard] = file
        return self._files[shard]

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            path, shape = self._path(shard), (self._rows(shard), self.row_bytes)
            # A map beyond the end of a file would end the process, not raise.
            if not path.is_file() or path.stat().st_size != shape[0] * shape[1]:
                raise DataError(
                    f"{path} is missing or cut off. What it held is asked again with:\n"
                    f"  {MAKE} -o {self.directory}"
                )
            self._maps[shard] = np.memmap(path, dtype=np.uint8, mode="r", shape=shape)
        return self._maps[shard]


def _tensor(array: np.ndarray, shape: tuple[int, int], device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).view(-1, *shape).to(device)


def position_bytes(asked: Asked, vocab_size: int) -> int:
    """What one position takes on disk."""
    tails = 0 if asked.sampled else 4 * len(asked.temperatures)
    return tails + asked.k * (dtype_for(vocab_size).itemsize + 2)


def describe(
    examples: Examples,
    teacher: dict[str, Any] | None,
    asked: Asked,
    precision: str | None = None,
) -> dict[str, Any]:
    """What a cache of these rows is a cache of."""
    return {
        "teacher": teacher,
        "precision": precision,
        "tokenizer": examples.tokenizer.fingerprint,
        "vocab_size": examples.vocab_size,
        "asked": asked.to_dict(),
        "data": examples.identity,
        "count": examples.count,
        "length": examples.length,
        # Row n, position p: the distribution of the token after input p.
        "position": "after the input",
    }


class CachedTeacher:
    """A teacher that has been asked before. ``teacher`` is the identity wanted, None for any.

    Raises DataError for a cache of another teacher, tokenizer or data set, and for one that holds
    too little; a larger one serves smaller ``asked.k`` and fewer temperatures.
    """

    def __init__(
        self,
        directory: str | Path,
        examples: Examples,
        asked: Asked,
        teacher: dict[str, Any] | None = None,
    ) -> None:
        self.cache, self.asked = TeacherCache(directory), asked
        self.cache.check(describe(examples, teacher, asked))
        self.identity: dict[str, Any] = self.cache.description["teacher"]

    def targets(
        self, numbers: Sequence[int], inputs: Tensor, starts: Tensor | None = None
    ) -> Targets:
        found = self.cache.read(numbers, inputs.device)
        return narrowed(found, self.asked.k, self.asked.temperatures)


class RecordingTeacher:
    """A teacher that is asked, and whose answers are kept (``cache_logits``): none twice.

    ``examples`` are the rows the numbers mean; a cache that stands in ``directory`` must be of the
    same teacher in the same precision, data and question.
    """

    def __init__(self, teacher: Teacher, directory: str | Path, examples: Examples) -> None:
        self.teacher, self.asked, self.identity = teacher, teacher.asked, teacher.identity
        self.cache = TeacherCache.create(
            directory,
            examples,
            teacher.identity,
            teacher.asked,
            precision=getattr(teacher, "precision", None),
        )

    def targets(
        self, numbers: Sequence[int], inputs: Tensor, starts: Tensor | None = None
    ) -> Targets:
        if not self.cache.filled(numbers).all():
            self.cache.write(numbers, self.teacher.targets(numbers, inputs, starts))
        # As it is kept, also the first time: a step that is made again learns the same.
        return self.cache.read(numbers, inputs.device)
