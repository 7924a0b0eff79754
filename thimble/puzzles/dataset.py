"""Puzzles on disk, in the layout of the HRM and TRM code bases, with a manifest of ours.

``<out>/{train,test}/dataset.json`` describes a split. Its arrays, named ``all__<field>.npy``, nest:
examples ``inputs`` and ``labels`` [N, seq_len] (uint8, 0 is padding); puzzle p holds the examples
``puzzle_indices[p] .. puzzle_indices[p + 1]`` and has the identifier ``puzzle_identifiers[p]``;
group g holds the puzzles ``group_indices[g] .. group_indices[g + 1]``, which are one puzzle and its
augmentations. ``identifiers.json`` names the identifiers; 0 is the blank one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from thimble import artifacts
from thimble import workers as parallel
from thimble.console import log
from thimble.errors import ConfigError, DataError

KIND = "puzzles"
MAKE = "thimble puzzles build sudoku --generate 1000"
BLANK = "<blank>"
FIELDS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Metadata:
    """``dataset.json`` of one split, field by field as those programs write it."""

    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    total_groups: int
    mean_puzzle_examples: float
    total_puzzles: int
    sets: list[str]

    @classmethod
    def read(cls, folder: Path) -> Metadata:
        """Of a split's folder; DataError where a field is missing."""
        found = artifacts.read_json(folder / "dataset.json")
        if not isinstance(found, dict):
            raise DataError(f"{folder / 'dataset.json'} describes no data set.")
        names = [field.name for field in dataclasses.fields(cls)]
        # The older of the two programs does not write this one.
        found.setdefault("total_puzzles", 0)
        if missing := [name for name in names if name not in found]:
            raise DataError(f"{folder / 'dataset.json'} has no {', '.join(missing)}.")
        return cls(**{name: found[name] for name in names})


@dataclass(frozen=True)
class Group:
    """One puzzle with its augmentations: ``sizes[p]`` examples belong to ``identifiers[p]``."""

    inputs: np.ndarray
    labels: np.ndarray
    sizes: Sequence[int]
    identifiers: Sequence[int]


class Rows:
    """A ``.npy`` file of uint8 rows [N, width], written as they come: N stands in it at the end."""

    def __init__(self, path: Path, width: int) -> None:
        self.width, self.count = width, 0
        self.file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._header()

    def _header(self) -> None:
        # NumPy pads the header so that the first axis may grow without moving the data.
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, self.width)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, dtype=np.uint8).tobytes())
        self.count += len(rows)

    def close(self) -> None:
        self._header()
        self.file.close()


class SplitWriter:
    """Writes one split group by group; memory does not grow with the examples."""

    def __init__(self, folder: Path, seq_len: int, vocab_size: int) -> None:
        folder.mkdir()
        self.folder, self.seq_len, self.vocab_size = folder, seq_len, vocab_size
        self.inputs = Rows(folder / "all__inputs.npy", seq_len)
        self.labels = Rows(folder / "all__labels.npy", seq_len)
        self.identifiers: list[int] = []
        self.puzzles, self.groups = [0], [0]

    def add(self, group: Group) -> None:
        self.inputs.add(group.inputs)
        self.labels.add(group.labels)
        self.identifiers += group.identifiers
        for size in group.sizes:
            self.puzzles.append(self.puzzles[-1] + size)
        self.groups.append(len(self.identifiers))

    def close(self, num_identifiers: int) -> dict[str, int]:
        """Write what is left; returns the counts of the split."""
        self.inputs.close()
        self.labels.close()
        for name, values in (
            ("puzzle_identifiers", self.identifiers),
            ("puzzle_indices", self.puzzles),
            ("group_indices", self.groups),
        ):
            np.save(self.folder / f"all__{name}.npy", np.array(values, dtype=np.int32))
        puzzles = len(self.identifiers)
        metadata = Metadata(
            pad_id=0,
            ignore_label_id=0,
            blank_identifier_id=0,
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            num_puzzle_identifiers=num_identifiers,
            total_groups=len(self.groups) - 1,
            mean_puzzle_examples=self.inputs.count / max(puzzles, 1),
            total_puzzles=puzzles,
            sets=["all"],
        )
        artifacts.write_json(self.folder / "dataset.json", dataclasses.asdict(metadata))
        return {
            "groups": metadata.total_groups,
            "puzzles": puzzles,
            "examples": self.inputs.count,
        }


@contextlib.contextmanager
def new_dataset(
    output: Path, inputs: Any, options: Mapping[str, Any]
) -> Iterator[tuple[Path, dict[str, Any]] | None]:
    """The folder to write a data set into and its counts, or None where it is already there.

    The manifest is written and the folder gets its name when the block ends. Raises ConfigError
    where ``output`` holds anything else.
    """
    if options["seed"] < 0:
        raise ConfigError(f"seed must be 0 or more, not {options['seed']}.")
    if artifacts.is_current(output, KIND, inputs, options):
        log.info("%s is already there and current", output)
        yield None
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{output} exists and holds something else. Choose another folder with --output, or "
            "remove that one."
        )
    counts: dict[str, Any] = {}
    with artifacts.atomic_directory(output) as folder:
        yield folder, counts
        artifacts.write_manifest(
            folder, KIND, inputs=inputs, options=options, counts=counts, packages=("numpy",)
        )


def write_identifiers(folder: Path, names: Sequence[str]) -> None:
    """``identifiers.json``: the name of each identifier, the blank one first."""
    text = json.dumps([BLANK, *names], ensure_ascii=False)
    artifacts.write_text(folder / "identifiers.json", text + "\n")


def in_order(
    function: Callable[[Item], Made], items: Iterable[Item], workers: int | None
) -> Generator[Made]:
    """``function`` of every item, in order, in so many processes (None: one a core).

    ``items`` may be endless: only a few are under way at a time.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}.")
    count = workers or os.cpu_count() or 1
    if isinstance(items, Sequence):
        count = min(count, len(items))
    with parallel.process_pool(max(count, 1)) as pool:
        yield from parallel.in_order(pool, function, ((item,) for item in items))
