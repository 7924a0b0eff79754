from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest

from thimble.artifacts import read_manifest
from thimble.errors import ConfigError, DataError
from thimble.puzzles import maze, tables
from thimble.puzzles.loader import Split
from thimble.puzzles.symmetry import INVERSE, dihedral


def reached(walls: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """Steps from ``start``, by spreading over the whole grid until nothing changes; -1: never."""
    steps = np.full(walls.shape, -1)
    steps[start] = 0
    for step in range(1, walls.size):
        now = steps == step - 1
        beside = np.zeros_like(now)
        beside[1:] |= now[:-1]
        beside[:-1] |= now[1:]
        beside[:, 1:] |= now[:, :-1]
        beside[:, :-1] |= now[:, 1:]
        steps[beside & ~walls & (steps < 0)] = step
    return steps


@pytest.mark.parametrize("size", [4, 7, 10, 30])
def test_a_made_maze_has_one_way_and_the_answer_is_it(size: int) -> None:
    for number in range(4):
        question, answer, length = maze.make(size, random.Random(number))
        grid, path = maze.tokens(question), maze.tokens(answer)
        steps = reached(grid == 1, tuple(np.argwhere(grid == 3)[0]))
        assert steps[grid == 4] == length
        assert (path == 5).sum() == length - 1
        assert sorted(steps[path == 5]) == list(range(1, length))
        assert ((path == grid) | ((path == 5) & (grid == 2))).all()
        # As many links between open cells as a tree has: no second way anywhere.
        free = grid != 1
        links = (free[1:] & free[:-1]).sum() + (free[:, 1:] & free[:, :-1]).sum()
        assert links == free.sum() - 1
        assert (steps >= 0).sum() == free.sum()
        assert maze.problem(tables.Row("", question, answer, length)) is None


def test_symmetries_are_the_numbered_ones_and_have_inverses() -> None:
    grid = np.arange(6).reshape(2, 3)
    wanted = [
        [[0, 1, 2], [3, 4, 5]],
        [[2, 5], [1, 4], [0, 3]],
        [[5, 4, 3], [2, 1, 0]],
        [[3, 0], [4, 1], [5, 2]],
        [[2, 1, 0], [5, 4, 3]],
        [[3, 4, 5], [0, 1, 2]],
        [[0, 3], [1, 4], [2, 5]],
        [[5, 2], [4, 1], [3, 0]],
    ]
    assert [dihedral(grid, number).tolist() for number in range(8)] == wanted
    for number in range(8):
        assert (dihedral(dihedral(grid, number), INVERSE[number]) == grid).all()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puzzles") / "maze"
    return maze.build(folder, generate=20, generate_test=6, size=8, aug=True, workers=1)


def test_the_layout_on_disk(built: Path) -> None:
    train = json.loads((built / "train" / "dataset.json").read_text())
    assert (train["vocab_size"], train["seq_len"], train["total_groups"]) == (6, 64, 20)
    assert np.load(built / "train" / "all__inputs.npy").shape == (160, 64)
    assert np.load(built / "test" / "all__inputs.npy").shape == (6, 64)
    assert set(np.load(built / "test" / "all__labels.npy").ravel()) == {1, 2, 3, 4, 5}
    assert np.load(built / "train" / "all__group_indices.npy").tolist() == list(range(0, 161, 8))


def test_augmentations_are_mazes_with_their_answers_and_none_is_in_test(built: Path) -> None:
    train, test = Split(built, "train"), Split(built, "test")
    for question, answer in zip(train.inputs, train.labels, strict=True):
        texts = ["".join(maze.ALPHABET[cell - 1] for cell in cells) for cells in (question, answer)]
        assert maze.problem(tables.Row("", *texts, 0)) is None
    known = {question.tobytes() for question in train.inputs}
    assert len(known) == 160
    assert not known & {question.tobytes() for question in test.inputs}


def test_the_same_bytes_for_any_number_of_workers(built: Path, tmp_path: Path) -> None:
    again = maze.build(tmp_path / "d", generate=20, generate_test=6, size=8, aug=True, workers=2)
    files = [read_manifest(path, "puzzles", make="")["files"] for path in (built, again)]
    assert files[0] == files[1]


def test_a_mirrored_maze_of_test_is_left_out_of_train(built: Path, tmp_path: Path) -> None:
    with open(built / "test.csv", newline="") as file:
        _, *rows = csv.reader(file)
    mirrored = [
        "".join("".join(line) for line in dihedral(np.array(list(text)).reshape(8, 8), 7))
        for text in rows[0][1:3]
    ]
    source = tmp_path / "s"
    source.mkdir()
    (source / "test.csv").write_bytes((built / "test.csv").read_bytes())
    (source / "train.csv").write_bytes((built / "train.csv").read_bytes())
    with open(source / "train.csv", "a", newline="") as file:
        csv.writer(file).writerow(["x", *mirrored, rows[0][3]])
    folder = maze.build(tmp_path / "a", source=source, workers=1)
    assert len(Split(folder, "train")) == 20
    assert len(Split(maze.build(tmp_path / "b", source=source, subsample_size=4), "train")) <= 4


def source_of(folder: Path, question: str, answer: str) -> Path:
    folder.mkdir()
    for name in ("train", "test"):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [["source", "q", "a", "rating"], ["x", question, answer, "1"]]
            )
    return folder


GOOD = "S  ##  G  # #   ", "Sooo##oG  # #   "


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("S  G#   #   #  x", GOOD[1], r"line 2: character 16 of the question is 'x'"),
        ("S" * 15 + "G", "S" * 14 + "GG", "without one start"),
        ("S   ####   G    ", "S   ####   G    ", "without a way from start to goal"),
        ("S  ##  G  # #   ", "Sooo##oG  # #   ", "with an answer that is another maze"),
        ("S   ## G  # #   ", "Sooo## G  # #   ", None),
        ("S G " + "#" * 12, "SoG " + "#" * 12, None),
        ("S G " + "#" * 12, "SoGo" + "#" * 12, "with an answer that is no shortest path"),
        ("S   ## G  # #   ", "S oo## G  # #   ", "with an answer that is no shortest path"),
        ("S      G        ", "So  oooG oo     ", "with an answer that is no shortest path"),
        ("S   ## G  # #   ", "Sooo##oG  # #   "[:-1], "the answer has 15 characters"),
        ("S G  ", "SoG  ", "mazes have 5 cells; they should be square"),
        ("S G" + " " * (31 * 31 - 3), "SoG" + " " * (31 * 31 - 3), "at most 30 x 30"),
    ],
)
def test_bad_mazes(tmp_path: Path, question: str, answer: str, message: str | None) -> None:
    source = source_of(tmp_path / "s", question, answer)
    # A sound one gets as far as the check that train and test differ.
    with pytest.raises(DataError, match=message or "All puzzles of train"):
        maze.build(tmp_path / "a", source=source, workers=1)
    assert not (tmp_path / "a").exists()


def test_sizes_that_are_none(tmp_path: Path) -> None:
    for size in (3, 31):
        with pytest.raises(ConfigError, match=f"size must be 4 to 30, not {size}"):
            maze.build(tmp_path / "a", generate=3, size=size)
    with pytest.raises(ConfigError, match="for generated puzzles"):
        maze.build(tmp_path / "a", size=10)
