from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.puzzles import arc_files
from thimble.errors import DataError
from thimble.puzzles import arc, maze, voting
from thimble.puzzles.loader import Split, evaluation_batches
from thimble.puzzles.voting import Predictions, Votes


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arc")
    prefix = arc_files.make(folder / "files", evaluation=6)
    return arc.build(
        folder / "a", input_file_prefix=prefix, subsets=["training", "evaluation"], num_aug=9
    )


def guessed(built: Path, seed: int, right: float = 0.4) -> Predictions:
    """For each row the answer, one of two wrong grids, or no grid; halting at random."""
    test, draw = Split(built, "test"), np.random.default_rng(seed)
    names = json.loads((built / "identifiers.json").read_text())
    tokens = np.array(test.labels)
    places = np.searchsorted(test.puzzles, np.arange(len(test)), side="right") - 1
    for row, place in enumerate(places):
        _, augmentation = arc.Augmentation.parse(names[test.puzzle_identifiers[place]])
        kind = draw.choice(4, p=[right, (0.9 - right) / 2, (0.9 - right) / 2, 0.1])
        if kind in (1, 2):
            tokens[row] = arc.encode(augmentation.apply(np.full((kind, 3), kind, np.uint8)))
        elif kind == 3:
            tokens[row] = 0
    # Few values, so that equal means occur.
    halting = draw.choice([0.25, 0.5], len(test)).astype(np.float32)
    return Predictions(np.arange(len(test)), tokens, halting)


def sizes(grid: str) -> tuple[int, int]:
    rows = json.loads(grid)
    return len(rows), len(rows[0])


def reference(built: Path, predictions: Predictions) -> tuple[dict[int, float], dict[str, Any]]:
    """The same by the plainest way: for each test input walk over all rows and count."""
    test = Split(built, "test")
    names = json.loads((built / "identifiers.json").read_text())
    puzzles = json.loads((built / "test_puzzles.json").read_text())
    right: dict[int, list[float]] = {1: [], 2: []}
    attempts: dict[str, Any] = {}
    for task, puzzle in puzzles.items():
        solved = Counter[int]()
        attempts[task] = []
        for number, pair in enumerate(puzzle["test"]):
            counts: dict[str, list[float]] = {}
            for place, identifier in enumerate(test.puzzle_identifiers):
                if names[identifier].split("|||")[0] != task:
                    continue
                row = int(test.puzzles[place]) + number
                _, augmentation = arc.Augmentation.parse(names[identifier])
                grid = augmentation.undo(arc.crop(predictions.tokens[row])).tolist()
                if grid and grid[0]:
                    counts.setdefault(json.dumps(grid), []).append(float(predictions.halting[row]))
            ranks = {
                # After votes and probability smaller grids come first, then darker ones.
                grid: (-len(halting), -np.mean(halting), *sizes(grid), json.loads(grid))
                for grid, halting in counts.items()
            }
            order = sorted(ranks, key=ranks.__getitem__)
            attempts[task].append([json.loads(grid) for grid in order[:2]])
            for k in right:
                solved[k] += json.dumps(pair["output"]) in order[:k]
        for k in right:
            right[k].append(solved[k] / len(puzzle["test"]))
    return {k: float(np.mean(shares)) for k, shares in right.items()}, attempts


@pytest.mark.parametrize("seed", range(5))
def test_scores_and_attempts_are_those_of_the_plain_way(built: Path, seed: int) -> None:
    predictions = guessed(built, seed)
    score = voting.score(built, predictions)
    wanted, attempts = reference(built, predictions)
    assert score.pass_at == pytest.approx(wanted)
    assert 0 < wanted[1] <= wanted[2]
    for task, tests in attempts.items():
        for best, given in zip(tests, score.submission[task], strict=True):
            assert given["attempt_1"] == best[0]
            assert given["attempt_2"] == best[-1]
    assert (score.tasks, score.test_inputs, score.without_prediction) == (6, 21, 0)
    assert score.without_grid == (predictions.tokens.max(axis=1) == 0).sum() > 0


def test_right_everywhere_and_nowhere(built: Path) -> None:
    assert voting.score(built, guessed(built, 0, right=0.9)).pass_at == {1: 1.0, 2: 1.0}
    assert voting.score(built, guessed(built, 0, right=0.0)).pass_at == {1: 0.0, 2: 0.0}


def test_votes_count_first_then_the_mean_probability_then_a_fixed_order() -> None:
    a, b, c = (np.full((1, 1), colour, np.uint8) for colour in (1, 2, 3))
    votes = Votes()
    for grid, halting in ((a, 1.0), (b, 0.1), (b, 0.1), (c, 0.1), (c, 0.2)):
        votes.add(grid, halting)
    assert [int(grid[0, 0]) for grid in votes.ranked()] == [3, 2, 1]
    equal = Votes()
    for grid in (c, a, b):
        equal.add(grid, 0.5)
    assert [int(grid[0, 0]) for grid in equal.ranked()] == [1, 2, 3]
    mean = Votes()  # the mean counts, not the sum, nor the greatest
    for grid, halting in ((a, 0.9), (a, 0.0), (b, 0.5), (b, 0.5)):
        mean.add(grid, halting)
    assert [int(grid[0, 0]) for grid in mean.ranked()] == [2, 1]


def test_grids_of_the_same_cells_and_another_shape_are_others() -> None:
    votes = Votes()
    for shape in ((2, 3), (3, 2), (6, 1)):
        votes.add(np.zeros(shape, np.uint8), 0.5)
    assert len(votes.ranked()) == 3


def test_a_task_counts_by_the_share_of_its_test_inputs(built: Path) -> None:
    test = Split(built, "test")
    tokens = np.zeros((len(test), 900), np.uint8)
    last = slice(-60, None)  # the last task: six test inputs, ten augmentations
    rows = np.arange(len(test))[last]
    solved = rows[(rows - rows[0]) % 6 < 2]  # the first two inputs of each
    tokens[solved] = test.labels[solved]
    score = voting.score(built, Predictions(np.arange(len(test)), tokens, np.ones(len(test))))
    assert score.pass_at[1] == pytest.approx((2 / 6) / 6)


def test_processes_together_score_as_one(built: Path, tmp_path: Path) -> None:
    predictions, test = guessed(built, 7), Split(built, "test")
    one = voting.score(built, predictions)
    for processes in (2, 3):
        for rank in range(processes):
            taken = np.concatenate(
                [b.examples for b in evaluation_batches(test, 8, rank, processes)]
            )
            taken = taken[taken >= 0][::-1]
            part = Predictions(taken, predictions.tokens[taken], predictions.halting[taken])
            part.save(tmp_path / f"{rank}.npz")
        parts = [Predictions.load(tmp_path / f"{rank}.npz") for rank in range(processes)]
        merged = voting.merge(parts)
        assert (merged.examples == np.arange(len(test))).all()
        assert voting.score(built, merged) == one
    with pytest.raises(DataError, match=r"examples have two predictions, the first 0"):
        voting.merge([predictions, parts[0]])
    with pytest.raises(DataError, match="no predictions"):
        voting.merge([])


def test_the_submission_has_the_form_of_the_competition(built: Path, tmp_path: Path) -> None:
    predictions = guessed(built, 1)
    some = predictions.examples[30:]
    score = voting.score(
        built, Predictions(some, predictions.tokens[30:], predictions.halting[30:])
    )
    assert score.without_prediction == 30
    score.write_submission(tmp_path / "submission.json")
    written = json.loads((tmp_path / "submission.json").read_text())
    puzzles = json.loads((built / "test_puzzles.json").read_text())
    assert list(written) == list(puzzles)
    for name, tests in written.items():
        assert len(tests) == len(puzzles[name]["test"])
        for attempts in tests:
            assert list(attempts) == ["attempt_1", "attempt_2"]
            for grid in attempts.values():
                arc.check_grid(grid, name)
    assert written["eval0"] == [{"attempt_1": [[0]], "attempt_2": [[0]]}]  # nothing was predicted
    assert "submission" not in score.to_dict()
    assert score.to_dict()["pass@2"] == score.pass_at[2]


def test_bad_predictions(built: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    with pytest.raises(DataError, match=r"p.npz does not exist"):
        Predictions.load(path)
    path.write_bytes(b"PK not")
    with pytest.raises(DataError, match="holds no predictions for ARC"):
        Predictions.load(path)
    np.savez(path, examples=np.arange(2), tokens=np.zeros((2, 900)))
    with pytest.raises(DataError, match="holds no predictions for ARC"):
        Predictions.load(path)
    np.savez(path, examples=np.array([{}]), tokens=np.zeros(2), halting=np.zeros(2))
    with pytest.raises(DataError, match="holds no predictions for ARC"):
        Predictions.load(path)  # a pickle is not read
    np.savez(path, examples=np.arange(2), tokens=np.zeros((2, 80)), halting=np.zeros(2))
    with pytest.raises(DataError, match=r"there should be tokens \[2, 900\]"):
        Predictions.load(path)
    outside = Predictions(np.array([10_000]), np.zeros((1, 900)), np.zeros(1))
    with pytest.raises(DataError, match="predictions are for others"):
        voting.score(built, outside)


def test_a_data_set_of_other_puzzles(tmp_path: Path) -> None:
    folder = maze.build(tmp_path / "m", generate=2, size=6, workers=1)
    with pytest.raises(DataError, match="is no ARC data set"):
        voting.score(folder, Predictions(np.arange(0), np.zeros((0, 900)), np.zeros(0)))
