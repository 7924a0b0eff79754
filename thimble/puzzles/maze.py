"""Maze data sets: from CSV files (of the hub, or your own) or generated, with augmentation."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import deque
from pathlib import Path

import numpy as np

from thimble import artifacts
from thimble.console import progress
from thimble.errors import ConfigError, DataError
from thimble.puzzles import tables
from thimble.puzzles.dataset import Group, SplitWriter, new_dataset, write_identifiers
from thimble.puzzles.symmetry import dihedral
from thimble.puzzles.tables import Row

SOURCE = "sapientinc/maze-30x30-hard-1k"
ALPHABET = "# SGo"  # 1 wall, 2 free, 3 start, 4 goal, 5 path
MAX_SIZE = 30
MIN_SIZE = 4


def build(
    output: str | Path,
    *,
    source: str | Path = SOURCE,
    generate: int | None = None,
    generate_test: int | None = None,
    size: int = 30,
    subsample_size: int | None = None,
    aug: bool = False,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Write a data set of mazes (``thimble.puzzles.dataset``) and return its folder.

    ``source``: a folder with train.csv and test.csv, or such a data set of the hub. ``generate``:
    instead make so many mazes of ``size`` x ``size`` cells for train, and ``generate_test`` (a
    tenth unless given) for test; they stand in the folder as CSV too. ``subsample_size``: draw so
    many training mazes. ``aug``: all eight symmetries of each training maze, as one group. Cells
    become 1 .. 5 in the order of ALPHABET; seq_len is size squared, the vocabulary 6.

    The same seed gives the same bytes for any number of ``workers``. Raises ConfigError, DataError
    or EnvironmentProblem; nothing is left at ``output`` then.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ConfigError(f"size must be {MIN_SIZE} to {MAX_SIZE}, not {size}.")
    if generate is None and (size != MAX_SIZE or generate_test is not None):
        raise ConfigError("--size and --test are for generated puzzles: add --generate 1000.")
    files = {} if generate is not None else tables.source_files(source)
    inputs = {name: artifacts.sha256_file(path) for name, path in files.items()}
    options = {"puzzle": "maze", "subsample_size": subsample_size, "aug": aug, "seed": seed}
    test = max((generate or 0) // 10, 1) if generate_test is None else generate_test
    if generate is not None:
        options |= {"generate": generate, "generate_test": test, "size": size}
    with new_dataset(Path(output), inputs, options) as new:
        if new is None:
            return Path(output)
        folder, counts = new
        splits: dict[str, list[Row]] = {}
        if generate is not None:
            make = functools.partial(_make, size, seed)
            splits = tables.generate(make, generate, test, min_difficulty=None, workers=workers)
            for name, rows in splits.items():
                tables.write_rows(folder / f"{name}.csv", rows)
        else:
            for name, path in files.items():
                counts[name] = {}
                rows = tables.read_rows(path, ALPHABET)
                side = math.isqrt(len(rows[0].question))
                if side**2 != len(rows[0].question) or side > MAX_SIZE:
                    raise DataError(
                        f"{path}: mazes have {len(rows[0].question)} cells; they should be square "
                        f"and at most {MAX_SIZE} x {MAX_SIZE}."
                    )
                if name == "train":
                    rows = tables.subsample(rows, subsample_size, seed)
                splits[name] = tables.sound(rows, problem, str(path), workers, counts[name])
            widths = {len(rows[0].question) for rows in splits.values()}
            if len(widths) > 1:
                raise DataError("The mazes of train.csv and test.csv are not of one size.")
            splits["train"] = tables.hold_out(
                splits["train"], splits["test"], _class, _class, workers, counts["train"]
            )
        for name, rows in splits.items():
            writer = SplitWriter(folder / name, len(rows[0].question), len(ALPHABET) + 1)
            turns = range(8 if aug and name == "train" else 1)
            with progress(name, len(rows), "mazes") as advance:
                for row in rows:
                    question, answer = tokens(row.question), tokens(row.answer)
                    writer.add(
                        Group(
                            np.stack([dihedral(question, turn).ravel() for turn in turns]),
                            np.stack([dihedral(answer, turn).ravel() for turn in turns]),
                            [1] * len(turns),
                            [0] * len(turns),
                        )
                    )
                    advance(1)
            counts[name] = counts.get(name, {}) | writer.close(1) | tables.ratings(rows)
        write_identifiers(folder, [])
    return Path(output)


def tokens(text: str) -> np.ndarray:
    """A maze as numbers [size, size], 1 .. 5 in the order of ALPHABET."""
    size = math.isqrt(len(text))
    return np.array([ALPHABET.index(cell) + 1 for cell in text], np.uint8).reshape(size, size)


@functools.cache
def neighbours(size: int) -> list[list[int]]:
    """The cells above, left, right and below of each cell of a square maze."""
    return [
        [
            (row + down) * size + column + right
            for down, right in ((-1, 0), (0, -1), (0, 1), (1, 0))
            if 0 <= row + down < size and 0 <= column + right < size
        ]
        for row in range(size)
        for column in range(size)
    ]


def distances(text: str, start: int) -> dict[int, int]:
    """Steps from ``start`` to every cell that can be reached, by breadth-first search."""
    beside = neighbours(math.isqrt(len(text)))
    steps, queue = {start: 0}, deque([start])
    while queue:
        place = queue.popleft()
        for other in beside[place]:
            if text[other] != "#" and other not in steps:
                steps[other] = steps[place] + 1
                queue.append(other)
    return steps


def problem(row: Row) -> str | None:
    """What is wrong with a maze: start and goal, an answer that is no shortest path; or None."""
    maze, answer = row.question, row.answer
    if maze.count("S") != 1 or maze.count("G") != 1 or "o" in maze:
        return "without one start, one goal and no path"
    start, goal = maze.index("S"), maze.index("G")
    steps = distances(maze, start)
    if goal not in steps:
        return "without a way from start to goal"
    path = {place for place, cell in enumerate(answer) if cell == "o"} | {start, goal}
    kept = all(cell == "o" or cell == was for cell, was in zip(answer, maze, strict=True))
    if not kept or any(maze[place] == "#" for place in path):
        return "with an answer that is another maze"
    # A shortest path has one cell at each distance, and each is beside the next.
    on_way = sorted(path, key=lambda place: steps.get(place, 0))
    beside = neighbours(math.isqrt(len(maze)))
    linked = all(b in beside[a] for a, b in itertools.pairwise(on_way))
    if not linked or len(on_way) != steps[goal] + 1:
        return "with an answer that is no shortest path"
    return None


def make(size: int, draw: random.Random) -> tuple[str, str, int]:
    """A random maze, its answer, and the steps from start to goal.

    A depth-first walk opens a cell only where it touches no other open one, so the open cells are a
    tree, with exactly one path between any two. The goal is at least half as far from the start as
    any cell is.
    """
    beside = neighbours(size)
    cells = ["#"] * size**2
    walk = [draw.randrange(size**2)]
    cells[walk[0]] = " "
    while walk:
        ways = [
            place
            for place in beside[walk[-1]]
            if cells[place] == "#" and sum(cells[other] == " " for other in beside[place]) == 1
        ]
        if ways:
            walk.append(draw.choice(ways))
            cells[walk[-1]] = " "
        else:
            walk.pop()
    start = draw.choice([place for place, cell in enumerate(cells) if cell == " "])
    steps = distances("".join(cells), start)
    far = max(steps.values())
    goal = draw.choice(sorted(place for place, count in steps.items() if 2 * count >= far))
    cells[start], cells[goal] = "S", "G"
    answer = cells.copy()
    place = goal
    while steps[place] > 1:
        place = next(other for other in beside[place] if steps.get(other) == steps[place] - 1)
        answer[place] = "o"
    return "".join(cells), "".join(answer), steps[goal]


def _make(size: int, seed: int, number: int) -> tuple[Row, bytes]:
    question, answer, length = make(size, random.Random(f"maze {size} {seed} {number}"))
    row = Row("generated", question, answer, length)
    return row, _class(row)


def _class(row: Row) -> bytes:
    """The same for a maze in all its eight guises."""
    maze = tokens(row.question)
    return min(dihedral(maze, turn).tobytes() for turn in range(8))
