"""``thimble teacher cache``: ask a teacher about every row of a data set, once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thimble import artifacts
from thimble.console import log, progress
from thimble.teachers.asked import Asked, Teacher
from thimble.teachers.cache import MAKE, TeacherCache, describe
from thimble.teachers.examples import Examples, open_examples

HOME = Path("data/teacher_cache")
SYNC_SECONDS = 30.0


@dataclass(frozen=True)
class Filled:
    """``rows`` that were wanted and are there. ``asked_now`` of them were asked by this call."""

    path: Path
    rows: int
    asked_now: int
    positions: int
    bytes_per_position: int
    bytes: int
    positions_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def fill(
    directory: str | Path,
    examples: Examples,
    teacher: Teacher,
    *,
    batch_positions: int = 8192,
    made_by: dict[str, Any] | None = None,
    rows: np.ndarray | None = None,
    wait: bool = False,
) -> Filled:
    """Ask for what is not there yet, and for what is damaged; then write the manifest.

    ``rows``: the numbers of those that are wanted, by default all; without the others there is no
    manifest. Interrupted or killed at any moment, the same call goes on where it was. ``wait`` for
    another process that is filling it, and take what that one has asked.
    """
    wanted = np.arange(examples.count) if rows is None else np.unique(rows)
    cache = TeacherCache.create(
        directory,
        examples,
        teacher.identity,
        teacher.asked,
        made_by,
        precision=getattr(teacher, "precision", None),
        rows=len(wanted),
    )
    with artifacts.locked(directory, "the teacher cache", wait=wait):
        if damaged := cache.forget_damaged():
            log.warning("%s: %d rows are damaged and are asked again", directory, damaged)
        missing = wanted[~cache.filled(wanted)]
        log.info(
            "%s: %s rows of %d positions to ask, %d bytes each position, %.2f GiB in all",
            directory, f"{len(missing):,}", cache.length, cache.position_bytes,
            len(wanted) * cache.row_bytes / 2**30,
        )  # fmt: skip
        seconds = ask(cache, examples, teacher, missing, max(1, batch_positions // cache.length))
        if cache.filled(np.arange(cache.count)).all():
            if len(missing) or not (Path(directory) / artifacts.MANIFEST).is_file():
                cache.seal()
            artifacts.read_manifest(directory, "teacher-cache", make=MAKE)
    return Filled(
        Path(directory),
        len(wanted),
        len(missing),
        len(wanted) * cache.length,
        cache.position_bytes,
        len(wanted) * cache.row_bytes,
        len(missing) * cache.length / seconds if len(missing) else None,
    )


def cache(
    teacher: str | Path,
    data: str | Path,
    asked: Asked,
    *,
    split: str = "train",
    length: int | None = None,
    output: str | Path | None = None,
    adapter: str | Path | None = None,
    served_model: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    ram_disk: bool = False,
    batch_positions: int = 8192,
) -> Filled:
    """``fill`` for a teacher by name: folder, run of ours, hub, or the address of a server.

    The cache's folder is called after data, split and all that it belongs to, unless given.
    """
    from thimble.teachers.named import open_teacher
    from thimble.training.devices import resolve_device

    examples = open_examples(data, split, length)
    found = open_teacher(
        teacher,
        examples,
        asked,
        adapter=adapter,
        served_model=served_model,
        device=resolve_device(device),
        precision=precision,
        ram_disk=ram_disk,
    )
    if output is None:
        output = home(data, split, examples, found)
    made_by = {"teacher": str(teacher), "adapter": adapter and str(adapter), "data": str(data)}
    return fill(output, examples, found, batch_positions=batch_positions, made_by=made_by)


def home(data: str | Path, split: str, examples: Examples, teacher: Teacher) -> Path:
    """Where the cache of a teacher's answers belongs, unless somebody says another place."""
    precision = getattr(teacher, "precision", None)
    name = artifacts.fingerprint(describe(examples, teacher.identity, teacher.asked, precision))
    return HOME / f"{Path(data).name}-{split}-{name}"


def ask(
    cache: TeacherCache, examples: Examples, teacher: Teacher, missing: np.ndarray, rows: int
) -> float:
    """Returns the seconds it took."""
    started = synced = time.monotonic()
    try:
        with progress("ask the teacher", len(missing) * cache.length, "tokens") as advance:
            for begin in range(0, len(missing), rows):
                numbers = missing[begin : begin + rows]
                inputs, _, starts = examples.rows(numbers)
                found = teacher.targets(
                    numbers.tolist(),
                    torch.from_numpy(inputs),
                    None if starts is None else torch.from_numpy(starts),
                )
                cache.write(numbers, found)
                advance(inputs.size)
                if time.monotonic() - synced > SYNC_SECONDS:
                    cache.sync()
                    synced = time.monotonic()
    finally:
        cache.sync()
    return max(time.monotonic() - started, 1e-9)
