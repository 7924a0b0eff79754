"""ARC data sets from the combined files of the Kaggle competition, with augmentation.

A grid of at most 30 x 30 cells becomes 900 tokens: 0 padding, 1 the end of its lines and columns,
colour + 2. Every task has augmentations, one of the eight symmetries and a renaming of the colours
other than 0, each with an identifier of its own: ``name|||tK|||permutation``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thimble import artifacts
from thimble.console import log, progress
from thimble.errors import ConfigError, DataError
from thimble.puzzles.dataset import Group, SplitWriter, in_order, new_dataset, write_identifiers
from thimble.puzzles.symmetry import INVERSE, dihedral

SIDE = 30
COLOURS = 10
END = 1
FIRST_COLOUR = 2
VOCAB_SIZE = FIRST_COLOUR + COLOURS
SEPARATOR = "|||"
RETRIES = 5  # draws for each wanted augmentation; many of a symmetric task are the same
SUBSETS = ("training", "evaluation", "concept")
TEST_PUZZLES = "test_puzzles.json"

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Augmentation:
    """Turn a grid, then rename its colours: colour c becomes ``colours[c]``."""

    turn: int = 0
    colours: tuple[int, ...] = tuple(range(COLOURS))

    def name(self, task: str) -> str:
        return f"{task}{SEPARATOR}t{self.turn}{SEPARATOR}{''.join(map(str, self.colours))}"

    @classmethod
    def parse(cls, identifier: str) -> tuple[str, Augmentation]:
        """The task and the augmentation that an identifier names; DataError if it names none."""
        task, *parts = identifier.split(SEPARATOR)
        if not parts:
            return task, cls()
        turn, colours = parts[0], parts[-1]
        if (
            len(parts) != 2
            or turn not in {f"t{number}" for number in range(8)}
            or sorted(colours) != list("0123456789")
        ):
            raise DataError(f"{identifier} is no identifier of an augmented ARC task.")
        return task, cls(int(turn[1:]), tuple(map(int, colours)))

    @classmethod
    def draw(cls, draw: np.random.Generator) -> Augmentation:
        """Any of 8 x 9!; colour 0, the background, stays."""
        turn = int(draw.integers(8))
        return cls(turn, (0, *(int(colour) for colour in draw.permutation(np.arange(1, COLOURS)))))

    def apply(self, grid: np.ndarray) -> np.ndarray:
        return np.array(self.colours, np.uint8)[dihedral(grid, self.turn)]

    def undo(self, grid: np.ndarray) -> np.ndarray:
        return dihedral(np.argsort(self.colours).astype(np.uint8)[grid], INVERSE[self.turn])


@dataclass(frozen=True)
class Task:
    """``demonstrations`` and ``tests``: pairs of grids; ``held_out``: its tests are not trained."""

    name: str
    demonstrations: list[Pair]
    tests: list[Pair]
    held_out: bool

    @property
    def side(self) -> int:
        """Of the smallest square that holds each of its grids."""
        pairs = self.demonstrations + self.tests
        return max(max(grid.shape) for pair in pairs for grid in pair)


def build(
    output: str | Path,
    *,
    input_file_prefix: str,
    subsets: Sequence[str] = SUBSETS,
    test_set_name: str = "evaluation",
    num_aug: int = 1000,
    max_side: int = SIDE,
    seed: int = 42,
    workers: int | None = None,
) -> Path:
    """Write an ARC data set (``thimble.puzzles.dataset``) and return its folder.

    Read are ``<prefix>_<subset>_challenges.json`` and ``..._solutions.json``. The pairs of all
    tasks are trained on, except the test pairs of the subset ``test_set_name``, which are the test
    split; so the demonstrations of a task that is scored train its identifiers. ``num_aug``:
    augmentations of each task, no two the same, fewer where the task is too symmetric. In training
    all but one example of each augmentation are moved to a random place. ``test_puzzles.json``
    holds the tasks to be scored. With ``max_side`` below 30 examples have that many tokens squared,
    and tasks with a larger grid are left out: something for a small machine to try.

    The same seed gives the same bytes for any number of ``workers``, and a task's augmentations do
    not depend on the other tasks. Raises ConfigError or DataError; nothing is left at ``output``.
    """
    if test_set_name not in subsets:
        raise ConfigError(
            f"The test set {test_set_name} is not among the subsets: {', '.join(subsets)}."
        )
    if num_aug < 0:
        raise ConfigError(f"num_aug must be 0 or more, not {num_aug}.")
    if not 1 <= max_side <= SIDE:
        raise ConfigError(f"max_side must be from 1 to {SIDE}, not {max_side}.")
    tasks, raw, files = _load(input_file_prefix, subsets, test_set_name)
    found, tasks = len(tasks), [task for task in tasks if task.side <= max_side]
    if not any(task.held_out for task in tasks):
        raise DataError(
            f"No task of {test_set_name} has only grids of at most {max_side} x {max_side}, so "
            "none could be scored. Allow larger ones: --max-side."
        )
    inputs = {path.name: artifacts.sha256_file(path) for path in files}
    options = {
        "puzzle": "arc",
        "subsets": list(subsets),
        "test_set_name": test_set_name,
        "num_aug": num_aug,
        "max_side": max_side,
        "seed": seed,
    }
    with new_dataset(Path(output), inputs, options) as new:
        if new is None:
            return Path(output)
        folder, counts = new
        train = SplitWriter(folder / "train", max_side**2, VOCAB_SIZE)
        test = SplitWriter(folder / "test", max_side**2, VOCAB_SIZE)
        names: list[str] = []
        short = 0
        made = in_order(
            functools.partial(_augmented, num_aug, seed, max_side),
            tasks,
            workers if len(tasks) * (1 + num_aug) > 2000 else 1,
        )
        with progress("arc", len(tasks), "tasks") as advance:
            for identifiers, trained, tested in made:
                numbers = range(len(names) + 1, len(names) + 1 + len(identifiers))
                names += identifiers
                short += len(identifiers) < 1 + num_aug
                for writer, examples in ((train, trained), (test, tested)):
                    if examples is not None:
                        sizes = [len(examples[0]) // len(identifiers)] * len(identifiers)
                        writer.add(Group(*examples, sizes, numbers))
                advance(1)
        for writer in (train, test):
            counts[writer.folder.name] = writer.close(1 + len(names))
        counts |= {"tasks": len(tasks), "identifiers": len(names)}
        counts["tasks left out"] = found - len(tasks)
        counts["tasks with fewer augmentations"] = short
        if short:
            log.info("%d of %d tasks are too symmetric for all augmentations", short, len(tasks))
        write_identifiers(folder, names)
        raw = {task.name: raw[task.name] for task in tasks if task.held_out}
        artifacts.write_text(folder / TEST_PUZZLES, json.dumps(raw) + "\n")
    return Path(output)


# ------------------------------------------------------------------------------------- the files


def _load(
    prefix: str, subsets: Sequence[str], test_set_name: str
) -> tuple[list[Task], dict[str, Any], list[Path]]:
    """All tasks, the raw ones of the test set with their outputs, and the files read."""
    tasks: list[Task] = []
    raw: dict[str, Any] = {}
    files: list[Path] = []
    owner: dict[str, str] = {}
    for subset in subsets:
        challenges = Path(f"{prefix}_{subset}_challenges.json").expanduser()
        solutions = challenges.with_name(challenges.name.replace("_challenges", "_solutions"))
        for path in (challenges, solutions):
            if not path.is_file():
                raise DataError(
                    f"The subset {subset} has no file {path}. Each subset needs two, "
                    f"{challenges.name} and {solutions.name}; --input-file-prefix is what stands "
                    f"before _{subset}."
                )
        files += [challenges, solutions]
        questions, answers = artifacts.read_json(challenges), artifacts.read_json(solutions)
        for path, content in ((challenges, questions), (solutions, answers)):
            if not isinstance(content, dict) or not content:
                raise DataError(f"{path} is no combined ARC file: it should map names to tasks.")
        for name, task in questions.items():
            where = f"{challenges}, task {name}"
            if name in owner:
                raise DataError(f"{where} is also in the subset {owner[name]}. Leave one out.")
            owner[name] = subset
            held_out = subset == test_set_name
            tasks.append(_task(name, task, answers.get(name), held_out, where))
            if held_out:
                pairs = [
                    {"input": pair["input"], "output": output}
                    for pair, output in zip(task["test"], answers[name], strict=True)
                ]
                raw[name] = {"train": task["train"], "test": pairs}
    return tasks, raw, files


def _task(name: str, task: Any, answers: Any, held_out: bool, where: str) -> Task:
    if SEPARATOR in name:
        raise DataError(f"{where}: a name must not hold {SEPARATOR}.")
    if not isinstance(task, dict) or not all(
        isinstance(task.get(part), list) and task[part] for part in ("train", "test")
    ):
        raise DataError(f"{where} should have pairs under both train and test.")
    if not isinstance(answers, list) or len(answers) != len(task["test"]):
        found = len(answers) if isinstance(answers, list) else "none"
        raise DataError(
            f"{where} has {len(task['test'])} test inputs, and the solutions file {found} for it."
        )
    pairs: dict[str, list[Pair]] = {"train": [], "test": []}
    for part, grids in pairs.items():
        for number, pair in enumerate(task[part]):
            if not isinstance(pair, dict):
                raise DataError(f"{where}, {part} {number} is no pair of input and output.")
            output = answers[number] if part == "test" else pair.get("output")
            place = f"{where}, {part} {number}"
            grids.append(
                (
                    check_grid(pair.get("input"), f"{place}, input"),
                    check_grid(output, f"{place}, output"),
                )
            )
    return Task(name, pairs["train"], pairs["test"], held_out)


def check_grid(grid: Any, where: str) -> np.ndarray:
    """A grid as uint8 [rows, columns]; DataError where it is none, or larger than 30 x 30."""
    if (
        not isinstance(grid, list)
        or not grid
        or not all(isinstance(row, list) and row and len(row) == len(grid[0]) for row in grid)
    ):
        raise DataError(f"{where}: a grid is a list of equally long lists of colours.")
    if len(grid) > SIDE or len(grid[0]) > SIDE:
        raise DataError(
            f"{where}: the grid has {len(grid)} x {len(grid[0])} cells, more than {SIDE} x {SIDE}."
        )
    for number, row in enumerate(grid):
        for colour in row:
            if type(colour) is not int or not 0 <= colour < COLOURS:
                raise DataError(
                    f"{where}, row {number}: {colour!r} is no colour, which are 0 to 9."
                )
    return np.array(grid, dtype=np.uint8)


# ------------------------------------------------------------------------------ grids and tokens


def encode(grid: np.ndarray, top: int = 0, left: int = 0, side: int = SIDE) -> np.ndarray:
    """A grid [rows, columns] of colours as [side^2] tokens, its corner at (top, left)."""
    bottom, right = top + grid.shape[0], left + grid.shape[1]
    tokens = np.zeros((side, side), np.uint8)
    tokens[top:bottom, left:right] = grid + FIRST_COLOUR
    tokens[bottom : bottom + 1, left:right] = END
    tokens[top:bottom, right : right + 1] = END
    return tokens.ravel()


def crop(tokens: np.ndarray) -> np.ndarray:
    """The largest grid of nothing but colours at the top left of [side^2] tokens, as colours.

    Of several equally large ones the one with the fewest rows; [0, 0] if a colour is not even in
    the corner.
    """
    side = math.isqrt(len(tokens))
    square = np.asarray(tokens).reshape(side, side)
    colour = (square >= FIRST_COLOUR) & (square < VOCAB_SIZE)
    widths = np.minimum.accumulate(np.logical_and.accumulate(colour, axis=1).sum(axis=1))
    areas = widths * np.arange(1, side + 1)
    rows = int(np.argmax(areas)) + 1 if areas.any() else 0
    columns = int(widths[rows - 1]) if rows else 0
    return (square[:rows, :columns] - FIRST_COLOUR).astype(np.uint8)


def _augmented(
    num_aug: int, seed: int, side: int, task: Task
) -> tuple[list[str], tuple[np.ndarray, np.ndarray] | None, tuple[np.ndarray, np.ndarray] | None]:
    """The identifiers of a task, and inputs and labels for the train and the test split."""
    key = int.from_bytes(hashlib.sha256(task.name.encode()).digest()[:8], "big")
    draw = np.random.default_rng([seed, key])
    pairs = task.demonstrations + task.tests
    versions = [pairs]
    names = [task.name]
    seen = {_digest(pairs)}
    for _ in range(RETRIES * num_aug):
        if len(versions) > num_aug:
            break
        augmentation = Augmentation.draw(draw)
        changed = [(augmentation.apply(a), augmentation.apply(b)) for a, b in pairs]
        if (digest := _digest(changed)) not in seen:
            seen.add(digest)
            versions.append(changed)
            names.append(augmentation.name(task.name))
    demonstrations = len(task.demonstrations)
    trained, tested = (demonstrations, len(pairs)) if task.held_out else (len(pairs), len(pairs))
    test = _encode_all([version[trained:tested] for version in versions], side, None)
    return names, _encode_all([version[:trained] for version in versions], side, draw), test


def _encode_all(
    versions: list[list[Pair]], side: int, draw: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs and labels [examples, side^2]; with ``draw`` all but one of a version are moved."""
    if not versions[0]:
        return None
    inputs, labels = [], []
    for pairs in versions:
        stays = int(draw.integers(len(pairs))) if draw else 0
        for number, (question, answer) in enumerate(pairs):
            top = left = 0
            if draw and number != stays:
                rows, columns = np.maximum(question.shape, answer.shape)
                top = int(draw.integers(side - rows + 1))
                left = int(draw.integers(side - columns + 1))
            inputs.append(encode(question, top, left, side))
            labels.append(encode(answer, top, left, side))
    return np.stack(inputs), np.stack(labels)


def _digest(pairs: list[Pair]) -> bytes:
    """The same for the same pairs in any order."""
    texts = sorted(
        b"".join(bytes(grid.shape) + np.ascontiguousarray(grid).tobytes() for grid in pair)
        for pair in pairs
    )
    return hashlib.sha256(b"".join(texts)).digest()
