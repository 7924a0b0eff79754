"""Sudoku data sets: from CSV files (of the hub, or your own) or generated, with augmentation."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from thimble import artifacts
from thimble.console import progress
from thimble.errors import ConfigError, DataError
from thimble.puzzles import sudoku_grids as grids
from thimble.puzzles import tables
from thimble.puzzles.dataset import Group, SplitWriter, in_order, new_dataset, write_identifiers
from thimble.puzzles.tables import Row

SOURCE = "sapientinc/sudoku-extreme"
CHECKED = 2000  # puzzles of a file whose solution is searched for


def build(
    output: str | Path,
    *,
    source: str | Path = SOURCE,
    generate: int | None = None,
    generate_test: int | None = None,
    size: int = 9,
    subsample_size: int | None = None,
    min_difficulty: int | None = None,
    num_aug: int = 0,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Write a Sudoku data set (``thimble.puzzles.dataset``) and return its folder.

    ``source``: a folder with train.csv and test.csv, or such a data set of the hub. ``generate``:
    instead make so many puzzles of ``size`` 4, 6 or 9 for train, and ``generate_test`` (a tenth
    unless given) for test; they stand in the folder as CSV too. ``subsample_size``: draw so many
    training puzzles. ``min_difficulty``: leave out what is rated lower; a generated puzzle's rating
    is the number of hard steps of ``sudoku_grids.solve``. ``num_aug``: augmentations of each
    training puzzle, which make up one group with it. Cells become digit + 1, an empty cell 1;
    seq_len is size squared, the vocabulary size + 2.

    The same seed gives the same bytes for any number of ``workers``. Raises ConfigError, DataError
    or EnvironmentProblem; nothing is left at ``output`` then.
    """
    if size not in grids.BOXES:
        raise ConfigError(f"size must be 4, 6 or 9, not {size}.")
    if num_aug < 0:
        raise ConfigError(f"num_aug must be 0 or more, not {num_aug}.")
    if generate is None and (size != 9 or generate_test is not None):
        raise ConfigError("--size and --test are for generated puzzles: add --generate 1000.")
    files = {} if generate is not None else tables.source_files(source)
    inputs = {name: artifacts.sha256_file(path) for name, path in files.items()}
    options = {
        "puzzle": "sudoku",
        "subsample_size": subsample_size,
        "min_difficulty": min_difficulty,
        "num_aug": num_aug,
        "seed": seed,
    }
    test = max((generate or 0) // 10, 1) if generate_test is None else generate_test
    if generate is not None:
        options |= {"generate": generate, "generate_test": test, "size": size}
    with new_dataset(Path(output), inputs, options) as new:
        if new is None:
            return Path(output)
        folder, counts = new
        splits: dict[str, list[Row]]
        if generate is not None:
            make = functools.partial(_make, size, seed)
            splits = tables.generate(
                make, generate, test, min_difficulty=min_difficulty, workers=workers
            )
            for name, rows in splits.items():
                tables.write_rows(folder / f"{name}.csv", rows)
        else:
            splits = {}
            for name, path in files.items():
                counts[name] = {}
                rows = tables.read_rows(path, ".0123456789", min_difficulty)
                if len(rows[0].question) != 81:
                    raise DataError(f"{path}: puzzles have 81 cells, not {len(rows[0].question)}.")
                if name == "train":
                    rows = tables.subsample(rows, subsample_size, seed)
                splits[name] = _sound(rows, path, seed, workers, counts[name])
            splits["train"] = tables.hold_out(
                splits["train"], splits["test"], _sieve, _class, workers, counts["train"]
            )
        for name, rows in splits.items():
            augmentations = num_aug if name == "train" else 0
            writer = SplitWriter(folder / name, len(rows[0].question), _size(rows[0]) + 2)
            groups = in_order(
                functools.partial(_groups, augmentations, seed),
                [(start, rows[start : start + 100]) for start in range(0, len(rows), 100)],
                workers if len(rows) * (1 + augmentations) > 20_000 else 1,
            )
            with progress(name, len(rows), "puzzles") as advance:
                for chunk in groups:
                    for group in chunk:
                        writer.add(group)
                    advance(len(chunk))
            givens = [sum(cell not in ".0" for cell in row.question) for row in rows]
            counts[name] = counts.get(name, {}) | writer.close(1) | tables.ratings(rows)
            counts[name]["givens"] = tables.spread(givens)
        write_identifiers(folder, [])
    return Path(output)


def cells_of(text: str) -> list[int]:
    """A question or an answer as numbers, 0 where a cell is empty."""
    return [0 if character == "." else int(character) for character in text]


def augment(
    puzzle: np.ndarray, solution: np.ndarray, count: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` random puzzles that are the given one in another guise: [count, cells] each.

    Digits are renamed, bands moved and rows within them, stacks and columns within them, and where
    boxes are square half of them are transposed. The solution goes through the same.
    """
    size = math.isqrt(len(puzzle))
    height, width = grids.BOXES[size]
    rows, columns = _orders(size, height, count, draw), _orders(size, width, count, draw)
    cells = rows[:, :, None] * size + columns[:, None, :]
    if height == width:
        turned = draw.random(count) < 0.5
        cells[turned] = cells[turned] % size * size + cells[turned] // size
    cells = cells.reshape(count, size**2)
    digits = np.zeros((count, size + 1), dtype=np.int64)
    digits[:, 1:] = 1 + np.argsort(draw.random((count, size)), axis=1)
    return (
        np.take_along_axis(digits, puzzle[cells], axis=1),
        np.take_along_axis(digits, solution[cells], axis=1),
    )


def _orders(size: int, thick: int, count: int, draw: np.random.Generator) -> np.ndarray:
    """Random orders of lines that keep bands of ``thick`` lines together: [count, size]."""
    bands = np.argsort(draw.random((count, size // thick)), axis=1)
    lines = np.argsort(draw.random((count, size // thick, thick)), axis=2)
    return (bands[:, :, None] * thick + lines).reshape(count, size)


def _groups(augmentations: int, seed: int, chunk: tuple[int, list[Row]]) -> list[Group]:
    groups = []
    for number, row in enumerate(chunk[1], start=chunk[0]):
        puzzle, solution = np.array(cells_of(row.question)), np.array(cells_of(row.answer))
        draw = np.random.default_rng([seed, number])
        puzzles, solutions = augment(puzzle, solution, augmentations, draw)
        size = 1 + augmentations
        inputs = np.concatenate([puzzle[None], puzzles]) + 1
        labels = np.concatenate([solution[None], solutions]) + 1
        groups.append(Group(inputs, labels, [1] * size, [0] * size))
    return groups


def _make(size: int, seed: int, number: int) -> tuple[Row, bytes]:
    draw = random.Random(f"sudoku {size} {seed} {number}")
    puzzle, solution, hard = grids.make(size, draw)
    question, answer = ("".join(map(str, cells)) for cells in (puzzle, solution))
    row = Row("generated", question.replace("0", "."), answer, hard)
    return row, grids.held_out_class(puzzle, solution)


def _sound(
    rows: list[Row], path: Path, seed: int, workers: int | None, counts: dict[str, Any]
) -> list[Row]:
    """Every answer is checked; for CHECKED of them also that there is no other one."""
    rows = tables.sound(rows, problem, str(path), workers, counts)
    sample = tables.subsample(rows, CHECKED, seed)
    kept = tables.sound(sample, ambiguity, str(path), workers, counts)
    counts["searched for a second solution"] = len(sample)
    wrong = {row.question for row in sample} - {row.question for row in kept}
    return [row for row in rows if row.question not in wrong]


def problem(row: Row) -> str | None:
    """What is wrong with a puzzle as far as its answer shows it, or None."""
    puzzle, answer = cells_of(row.question), cells_of(row.answer)
    if not grids.is_solution(answer):
        return "with an answer that is no solution"
    if any(given not in (0, digit) for given, digit in zip(puzzle, answer, strict=True)):
        return "with an answer that changes a given"
    return None


def ambiguity(row: Row) -> str | None:
    """Whether a puzzle has other solutions beside its answer."""
    solutions, _ = grids.solve(cells_of(row.question))
    return "with more than one solution" if len(solutions) > 1 else None


def _sieve(row: Row) -> int:
    return grids.invariant(cells_of(row.question))


def _class(row: Row) -> bytes:
    return grids.puzzle_class(cells_of(row.question), cells_of(row.answer))


def _size(row: Row) -> int:
    return math.isqrt(len(row.question))
