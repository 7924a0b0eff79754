"""ARC answers from the predictions for all augmentations of a task: votes, scores, a submission.

A prediction is cropped, its augmentation undone, and it votes for the grid that remains. Grids are
ranked by their number of votes, then by the mean halting probability of those votes.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thimble import artifacts
from thimble.errors import DataError
from thimble.puzzles import arc

ATTEMPTS = 2
ARRAYS = ("examples", "tokens", "halting")


@dataclass(frozen=True)
class Predictions:
    """Of ``n`` rows of the test split, as one process made them.

    ``examples`` [n]: row numbers of ``all__inputs.npy``, each once; ``tokens`` [n, 900]: the
    likeliest token at every position; ``halting`` [n]: probability in [0, 1] of being right.
    """

    examples: np.ndarray
    tokens: np.ndarray
    halting: np.ndarray

    def save(self, path: str | Path) -> None:
        """As an ``.npz`` file, which ``load`` reads."""
        with artifacts.atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                examples=self.examples.astype(np.int64),
                tokens=self.tokens.astype(np.uint8),
                halting=self.halting.astype(np.float32),
            )

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Raises DataError for what is missing, damaged or of another shape."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = cls(*(file[name] for name in ARRAYS))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist.") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} holds no predictions for ARC: {error}.") from error
        count = len(found.examples)
        side = math.isqrt(found.tokens.shape[-1]) if found.tokens.ndim else 0
        if found.tokens.shape != (count, side**2) or found.halting.shape != (count,):
            raise DataError(
                f"{path}: for {count} examples there should be tokens [{count}, {arc.SIDE**2}], or "
                f"of another square, and halting [{count}], not {found.tokens.shape} and "
                f"{found.halting.shape}."
            )
        return found


def merge(parts: Iterable[Predictions]) -> Predictions:
    """The predictions of all processes as one, in the order of the examples.

    Raises DataError where two processes answered the same example.
    """
    parts = list(parts)
    if not parts:
        raise DataError("There are no predictions to merge.")
    examples, tokens, halting = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS
    )
    order = np.argsort(examples, kind="stable")
    merged = Predictions(examples[order], tokens[order], halting[order])
    twice = merged.examples[1:][np.diff(merged.examples) == 0]
    if len(twice):
        raise DataError(f"{len(twice)} examples have two predictions, the first {twice[0]}.")
    return merged


@dataclass(frozen=True)
class Score:
    """``pass_at[k]``: mean over tasks of the share of test inputs answered within k attempts.

    ``without_prediction``: rows of the test split that no process answered. ``without_grid``:
    predictions that hold no grid and do not vote. ``submission``: task -> for each test input
    ``{"attempt_1": grid, "attempt_2": grid}``; without any vote both are ``[[0]]``.
    """

    pass_at: dict[int, float]
    tasks: int
    test_inputs: int
    predictions: int
    without_prediction: int
    without_grid: int
    submission: dict[str, list[dict[str, Any]]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the submission."""
        return {
            **{f"pass@{k}": value for k, value in self.pass_at.items()},
            "tasks": self.tasks,
            "test_inputs": self.test_inputs,
            "predictions": self.predictions,
            "without_prediction": self.without_prediction,
            "without_grid": self.without_grid,
        }

    def write_submission(self, path: str | Path) -> None:
        """``submission.json`` as the competition takes it."""
        artifacts.write_text(path, json.dumps(self.submission) + "\n")


class Votes:
    """For one test input: the grids voted for."""

    def __init__(self) -> None:
        self.grids: dict[bytes, np.ndarray] = {}
        self.halting: dict[bytes, list[float]] = {}

    def add(self, grid: np.ndarray, halting: float) -> None:
        key = bytes(grid.shape) + np.ascontiguousarray(grid).tobytes()
        self.grids.setdefault(key, grid)
        self.halting.setdefault(key, []).append(halting)

    def ranked(self) -> list[np.ndarray]:
        """Most votes first, then the higher mean halting probability, then a fixed order."""

        def rank(key: bytes) -> tuple[int, float, bytes]:
            votes = self.halting[key]
            return -len(votes), -sum(votes) / len(votes), key

        return [self.grids[key] for key in sorted(self.grids, key=rank)]


def score(dataset: str | Path, predictions: Predictions, ks: Sequence[int] = (1, 2)) -> Score:
    """Score predictions for the test split of an ARC data set; ``merge`` those of processes first.

    Raises DataError where the folder is no such data set, or a prediction is for no row of it.
    """
    folder = Path(dataset)
    if not (folder / arc.TEST_PUZZLES).is_file():
        raise DataError(f"{folder} is no ARC data set: it has no {arc.TEST_PUZZLES}.")
    puzzles = artifacts.read_json(folder / arc.TEST_PUZZLES)
    names = artifacts.read_json(folder / "identifiers.json")
    starts = np.load(folder / "test" / "all__puzzle_indices.npy")
    identifiers = np.load(folder / "test" / "all__puzzle_identifiers.npy")
    examples = predictions.examples
    if len(examples) and not 0 <= examples.min() <= examples.max() < starts[-1]:
        raise DataError(
            f"The test split has rows 0 to {starts[-1] - 1}; predictions are for others."
        )
    votes = {(name, i): Votes() for name in puzzles for i in range(len(puzzles[name]["test"]))}
    # A puzzle's examples are its task's test inputs in their order.
    places = np.searchsorted(starts, examples, side="right") - 1
    without_grid = 0
    for row in np.argsort(examples, kind="stable"):
        place = places[row]
        task, augmentation = arc.Augmentation.parse(names[identifiers[place]])
        grid = augmentation.undo(arc.crop(predictions.tokens[row]))
        if grid.size:
            number = int(examples[row] - starts[place])
            votes[task, number].add(grid, float(predictions.halting[row]))
        else:
            without_grid += 1
    return Score(
        *_scores(puzzles, votes, ks),
        predictions=len(examples),
        without_prediction=int(starts[-1]) - len(np.unique(examples)),
        without_grid=without_grid,
        submission=_submission(puzzles, votes),
    )


def _scores(puzzles: Any, votes: Any, ks: Sequence[int]) -> tuple[dict[int, float], int, int]:
    right: dict[int, list[float]] = {k: [] for k in ks}
    for name, puzzle in puzzles.items():
        ranks = []
        for number, pair in enumerate(puzzle["test"]):
            answers = [grid.tolist() for grid in votes[name, number].ranked()]
            found = pair["output"] in answers
            ranks.append(answers.index(pair["output"]) if found else len(answers) + max(ks))
        for k in ks:
            right[k].append(sum(rank < k for rank in ranks) / len(ranks))
    inputs = sum(len(puzzle["test"]) for puzzle in puzzles.values())
    return {k: sum(shares) / len(shares) for k, shares in right.items()}, len(puzzles), inputs


def _submission(puzzles: Any, votes: Any) -> dict[str, list[dict[str, Any]]]:
    submission: dict[str, list[dict[str, Any]]] = {}
    for name, puzzle in puzzles.items():
        submission[name] = []
        for number in range(len(puzzle["test"])):
            grids = [grid.tolist() for grid in votes[name, number].ranked()[:ATTEMPTS]] or [[[0]]]
            grids += grids[:1] * (ATTEMPTS - len(grids))
            submission[name].append({f"attempt_{i + 1}": grid for i, grid in enumerate(grids)})
    return submission
