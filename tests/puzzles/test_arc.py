from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.puzzles import arc_files
from thimble.artifacts import read_manifest
from thimble.errors import ConfigError, DataError
from thimble.puzzles import arc
from thimble.puzzles.loader import Split

SUBSETS = ("training", "evaluation")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return arc_files.make(tmp_path_factory.mktemp("arc"))


@pytest.fixture(scope="module")
def built(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puzzles") / "arc"
    return arc.build(folder, input_file_prefix=prefix, subsets=SUBSETS, num_aug=20, workers=1)


def names_of(split: Split, folder: Path) -> list[str]:
    names = json.loads((folder / "identifiers.json").read_text())
    return [names[i] for i in split.puzzle_identifiers]


# ------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("turn", range(8))
def test_undo_undoes_and_the_name_says_how(turn: int) -> None:
    draw = np.random.default_rng(turn)
    for _ in range(20):
        colours = (0, *draw.permutation(np.arange(1, 10)).tolist())
        augmentation = arc.Augmentation(turn, colours)
        name = augmentation.name("00ab")
        assert name == f"00ab|||t{turn}|||{''.join(map(str, colours))}"
        assert arc.Augmentation.parse(name) == ("00ab", augmentation)
        shape = tuple(draw.integers(1, 31, 2))
        grid = draw.integers(0, 10, shape).astype(np.uint8)
        changed = augmentation.apply(grid)
        assert (changed == 0).sum() == (grid == 0).sum()  # the background stays
        assert (augmentation.undo(changed) == grid).all()
        assert changed.shape == (shape if turn in (0, 2, 4, 5) else shape[::-1])


def test_all_turns_are_drawn_and_colour_0_stays() -> None:
    draw = np.random.default_rng(0)
    drawn = [arc.Augmentation.draw(draw) for _ in range(300)]
    assert {one.turn for one in drawn} == set(range(8))
    assert {one.colours[0] for one in drawn} == {0}
    assert len({one.colours for one in drawn}) == 300


def test_a_name_without_augmentation_and_names_that_are_none() -> None:
    assert arc.Augmentation.parse("00ab") == ("00ab", arc.Augmentation())
    for name in ("a|||t8|||0123456789", "a|||t1|||0123456788", "a|||t1", "a|||b|||c|||d"):
        with pytest.raises(DataError, match="is no identifier"):
            arc.Augmentation.parse(name)


def test_encoded_and_cropped_is_the_same_grid() -> None:
    draw = np.random.default_rng(0)
    for shape in [(1, 1), (30, 30), (30, 1), (1, 30), *draw.integers(1, 31, (20, 2)).tolist()]:
        grid = draw.integers(0, 10, shape).astype(np.uint8)
        tokens = arc.encode(grid)
        assert (arc.crop(tokens) == grid).all()
        square = tokens.reshape(30, 30)
        assert (square == 1).sum() == (shape[1] if shape[0] < 30 else 0) + (
            shape[0] if shape[1] < 30 else 0
        )
        top, left = draw.integers(0, 31 - np.array(shape))
        moved = arc.encode(grid, top, left).reshape(30, 30)
        assert (moved[top : top + shape[0], left : left + shape[1]] == grid + 2).all()
        assert (moved >= 2).sum() == grid.size


def test_crop_takes_the_largest_grid_of_colours_at_the_corner() -> None:
    """Against trying all sizes."""
    draw = np.random.default_rng(0)
    for threshold in np.linspace(0.02, 1, 30):
        square = draw.integers(2, 12, (30, 30))
        square[draw.random((30, 30)) < threshold] = draw.integers(0, 2)
        best = (0, 0)
        for rows in range(1, 31):
            for columns in range(1, 31):
                whole = (square[:rows, :columns] >= 2).all()
                if whole and rows * columns > best[0] * best[1]:
                    best = (rows, columns)
        assert (arc.crop(square.ravel()) + 2 == square[: best[0], : best[1]]).all()
        assert arc.crop(square.ravel()).size == best[0] * best[1]
    assert arc.crop(np.zeros(900)).size == 0


# ----------------------------------------------------------------------------------- data sets


def test_what_is_trained_and_what_is_held_out(built: Path, prefix: str) -> None:
    train, test = Split(built, "train"), Split(built, "test")
    assert train.metadata.vocab_size == test.metadata.vocab_size == 12
    assert train.metadata.seq_len == 900
    assert train.metadata.num_puzzle_identifiers == 1 + 5 * 21
    assert train.metadata.total_groups == 5
    assert test.metadata.total_groups == 2
    # Three demonstrations each, and of the training subset the test pair too.
    assert len(train) == 21 * (3 * 4 + 2 * 3)
    assert len(test) == 21 * (1 + 2)
    names = names_of(train, built)
    assert names[0] == "train0"
    assert len(set(names)) == len(names) == 105
    assert names_of(test, built) == [name for name in names if name.startswith("eval")]
    solutions = json.loads(Path(f"{prefix}_evaluation_solutions.json").read_text())
    held_out = [np.array(output) for outputs in solutions.values() for output in outputs]
    cropped = [arc.crop(labels) for labels in train.labels]  # where they were not moved
    for output in held_out:
        assert not any(np.array_equal(output, grid) for grid in cropped)
    puzzles = json.loads((built / "test_puzzles.json").read_text())
    assert list(puzzles) == ["eval0", "eval1"]
    assert [pair["output"] for pair in puzzles["eval1"]["test"]] == solutions["eval1"]


def test_every_test_row_undone_is_its_test_pair(built: Path) -> None:
    test = Split(built, "test")
    puzzles = json.loads((built / "test_puzzles.json").read_text())
    for puzzle, name in enumerate(names_of(test, built)):
        task, augmentation = arc.Augmentation.parse(name)
        start, end = test.puzzles[puzzle : puzzle + 2]
        for row, pair in zip(range(start, end), puzzles[task]["test"], strict=True):
            for tokens, key in ((test.inputs[row], "input"), (test.labels[row], "output")):
                assert augmentation.undo(arc.crop(tokens)).tolist() == pair[key]


def test_every_training_row_undone_is_a_pair_and_one_of_each_puzzle_is_not_moved(
    built: Path, prefix: str
) -> None:
    train = Split(built, "train")
    pairs: dict[str, list[Any]] = {}
    for subset in SUBSETS:
        tasks = json.loads(Path(f"{prefix}_{subset}_challenges.json").read_text())
        solutions = json.loads(Path(f"{prefix}_{subset}_solutions.json").read_text())
        for name, task in tasks.items():
            pairs[name] = [(p["input"], p["output"]) for p in task["train"]]
            if subset == "training":
                pairs[name].append((task["test"][0]["input"], solutions[name][0]))
    moved = 0
    for puzzle, name in enumerate(names_of(train, built)):
        task, augmentation = arc.Augmentation.parse(name)
        start, end = train.puzzles[puzzle : puzzle + 2]
        corners = []
        for row, pair in zip(range(start, end), pairs[task], strict=True):
            squares = [t.reshape(30, 30) for t in (train.inputs[row], train.labels[row])]
            places = [np.argwhere(square >= 2) for square in squares]
            assert (places[0][0] == places[1][0]).all()  # both are moved alike
            corners.append(places[0][0].tolist())
            for square, place, grid in zip(squares, places, pair, strict=True):
                (top, left), (bottom, right) = place[0], place[-1] + 1
                assert augmentation.undo(square[top:bottom, left:right] - 2).tolist() == grid
        assert [0, 0] in corners
        moved += sum(corner != [0, 0] for corner in corners)
    assert moved > 0.9 * (len(train) - len(train.puzzle_identifiers))


def test_no_augmentation_twice_and_symmetric_tasks_have_fewer(tmp_path: Path) -> None:
    dot = {"input": [[1]], "output": [[0]]}
    prefix = arc_files.write(
        tmp_path / "f", {"evaluation": {"dot": ({"train": [dot], "test": [dot]}, [[[0]]])}}
    )
    options: dict[str, Any] = {"input_file_prefix": prefix, "subsets": ["evaluation"], "workers": 1}
    folder = arc.build(tmp_path / "a", num_aug=50, **options)
    train = Split(folder, "train")
    assert len(train) == 9  # one cell, whose colour is one of nine
    corners = [tokens[tokens >= 2] for tokens in train.inputs]
    assert sorted(int(colour[0]) for colour in corners) == list(range(3, 12))
    counts = read_manifest(folder, "puzzles", make="")["counts"]
    assert counts["tasks with fewer augmentations"] == 1


def test_the_same_bytes_for_any_number_of_workers_and_other_tasks(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"input_file_prefix": prefix, "num_aug": 500}
    one = arc.build(tmp_path / "1", subsets=SUBSETS, workers=1, **options)
    two = arc.build(tmp_path / "2", subsets=SUBSETS, workers=2, **options)
    assert (
        read_manifest(one, "puzzles", make="")["files"]
        == (read_manifest(two, "puzzles", make="")["files"])
    )
    alone = arc.build(tmp_path / "3", subsets=["evaluation"], workers=1, **options)
    name = Path("test/all__inputs.npy")
    assert (alone / name).read_bytes() == (one / name).read_bytes()
    other = arc.build(tmp_path / "4", subsets=["evaluation"], workers=1, seed=1, **options)
    assert (alone / name).read_bytes() != (other / name).read_bytes()


def test_without_augmentation(prefix: str, tmp_path: Path) -> None:
    folder = arc.build(
        tmp_path / "a", input_file_prefix=prefix, subsets=SUBSETS, num_aug=0, workers=1
    )
    assert names_of(Split(folder, "test"), folder) == ["eval0", "eval1"]


# ------------------------------------------------------------------------------------ bad input


def spoilt(change: str, value: Any) -> tuple[dict[str, Any], list[Any]]:
    task, answers = arc_files.task(random.Random(0))
    if change == "solutions":
        return task, value
    if change in ("train", "test"):
        task[change] = value
    else:
        task["train"][1][change] = value
    return task, answers


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("input", [[0] * 31], "task bad, train 1, input: the grid has 1 x 31 cells, more than 30"),
        ("output", [[0]] * 31, "task bad, train 1, output: the grid has 31 x 1 cells, more than"),
        ("input", [[0, 1], [2]], "train 1, input: a grid is a list of equally long lists"),
        ("input", [], "train 1, input: a grid is a list of equally long lists"),
        ("output", None, "train 1, output: a grid is a list of equally long lists"),
        ("output", [[0], [10]], "train 1, output, row 1: 10 is no colour"),
        ("output", [[0, "x"]], "train 1, output, row 0: 'x' is no colour"),
        ("output", [[True]], "True is no colour"),
        ("train", [], "task bad should have pairs under both train and test"),
        ("test", None, "task bad should have pairs under both train and test"),
        ("train", [3], "task bad, train 0 is no pair of input and output"),
        ("solutions", [], "has 1 test inputs, and the solutions file 0 for it"),
        ("solutions", None, "has 1 test inputs, and the solutions file none for it"),
    ],
)
def test_a_bad_task_is_named(tmp_path: Path, change: str, value: Any, message: str) -> None:
    tasks = {"evaluation": {"good": arc_files.task(random.Random(1)), "bad": spoilt(change, value)}}
    prefix = arc_files.write(tmp_path / "f", tasks)
    with pytest.raises(DataError, match=message):
        arc.build(tmp_path / "a", input_file_prefix=prefix, subsets=["evaluation"], workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_missing_files_and_doubled_tasks(tmp_path: Path) -> None:
    prefix = arc_files.make(tmp_path / "f")
    options: dict[str, Any] = {"input_file_prefix": prefix, "workers": 1}
    with pytest.raises(DataError, match=r"subset concept has no file .*arc_concept_challenges"):
        arc.build(tmp_path / "a", **options)
    with pytest.raises(ConfigError, match="test set evaluation is not among the subsets: training"):
        arc.build(tmp_path / "a", subsets=["training"], **options)
    with pytest.raises(DataError, match="task eval0 is also in the subset evaluation"):
        arc.build(tmp_path / "a", subsets=["evaluation", "evaluation"], **options)
    solutions = tmp_path / "f" / "arc_training_solutions.json"
    solutions.write_text("[]")
    with pytest.raises(DataError, match=r"arc_training_solutions\.json is no combined ARC file"):
        arc.build(tmp_path / "a", subsets=SUBSETS, **options)
    solutions.unlink()
    with pytest.raises(DataError, match=r"subset training has no file .*arc_training_solutions"):
        arc.build(tmp_path / "a", subsets=SUBSETS, **options)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConfigError, match="exists and holds something else"):
        arc.build(tmp_path / "a", input_file_prefix=prefix, subsets=SUBSETS, workers=1)
    assert (tmp_path / "a").read_text() == "mine"


def test_a_small_side_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    draw = random.Random(1)
    grids = {n: [[draw.randrange(10) for _ in range(n)] for _ in range(3)] for n in (4, 12)}

    def square(size: int) -> tuple[dict[str, Any], list[arc_files.Grid]]:
        pair = {"input": grids[size], "output": grids[size]}
        return {"train": [pair], "test": [{"input": grids[size]}]}, [grids[size]]

    tasks = {"small": square(4), "large": square(12)}
    prefix = arc_files.write(tmp_path / "files", {"evaluation": tasks})
    made = arc.build(
        tmp_path / "made", input_file_prefix=prefix, subsets=["evaluation"], num_aug=3, max_side=5
    )
    counts = read_manifest(made, "puzzles", make="")["counts"]
    assert (counts["tasks"], counts["tasks left out"]) == (1, 1)
    test = Split(made, "test")
    assert test.metadata.seq_len == 25
    assert list(json.loads((made / "test_puzzles.json").read_text())) == ["small"]
    # The same grid, on a smaller canvas.
    assert (arc.crop(test.labels[0]) == np.array(grids[4])).all()


def test_no_task_that_small_is_refused(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only grids of at most 1 x 1"):
        arc.build(tmp_path / "x", input_file_prefix=prefix, subsets=SUBSETS, max_side=1)
    with pytest.raises(ConfigError, match="from 1 to 30"):
        arc.build(tmp_path / "x", input_file_prefix=prefix, subsets=SUBSETS, max_side=31)
    assert not (tmp_path / "x").exists()
