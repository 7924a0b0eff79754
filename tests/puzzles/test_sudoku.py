from __future__ import annotations

import csv
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from thimble.artifacts import damaged_files, read_manifest
from thimble.errors import ConfigError, DataError
from thimble.puzzles import sudoku, tables
from thimble.puzzles import sudoku_grids as grids
from thimble.puzzles.loader import Split

SIZES = sorted(grids.BOXES)


def made(size: int, number: int = 0) -> tuple[list[int], list[int], int]:
    return grids.make(size, random.Random(number))


def brute_force(cells: list[int]) -> list[list[int]]:
    """All solutions, by trying every digit in every cell."""
    if 0 not in cells:
        return [cells]
    size = int(len(cells) ** 0.5)
    place, found = cells.index(0), []
    row, column, box = grids.units_of(size)[place]
    taken = {
        value
        for value, units in zip(cells, grids.units_of(size), strict=True)
        if {row, column, box} & set(units)
    }
    for digit in set(range(1, size + 1)) - taken:
        found += brute_force([*cells[:place], digit, *cells[place + 1 :]])
    return found


# ------------------------------------------------------------------------------ solver, generator


@pytest.mark.parametrize("size", [4, 6])
def test_the_solver_finds_what_trying_everything_finds(size: int) -> None:
    draw = random.Random(1)
    for number in range(8):
        puzzle, _, _ = made(size, number)
        for place in draw.sample([p for p, value in enumerate(puzzle) if value], 2):
            puzzle[place] = 0  # most of these have several solutions
        wanted = sorted(brute_force(puzzle))
        assert sorted(grids.solve(puzzle, limit=10_000)[0]) == wanted
        assert len(grids.solve(puzzle)[0]) == min(2, len(wanted))


def test_all_288_grids_of_4x4_are_found() -> None:
    solutions, _ = grids.solve([0] * 16, limit=1000)
    assert len({tuple(solution) for solution in solutions}) == len(solutions) == 288


def test_a_published_hard_sudoku() -> None:
    text = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
    solutions, hard = grids.solve(sudoku.cells_of(text))
    answer = "812753649943682175675491283154237896369845721287169534521974368438526917796318452"
    assert solutions == [sudoku.cells_of(answer)]
    assert hard > 100


def test_what_contradicts_itself_has_no_solution() -> None:
    assert grids.solve([1, 1] + [0] * 14)[0] == []
    # Nothing is there twice, and yet the last cell of the first row cannot be filled.
    assert grids.solve([1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 4] + [0] * 4)[0] == []


@pytest.mark.parametrize("size", SIZES)
def test_a_made_puzzle_has_one_solution_and_its_givens(size: int) -> None:
    for number in range(6):
        puzzle, solution, _ = made(size, number)
        assert grids.solve(puzzle)[0] == [solution]
        assert grids.is_solution(solution)
        assert all(given in (0, digit) for given, digit in zip(puzzle, solution, strict=True))
        assert sum(given > 0 for given in puzzle) >= grids.GIVENS[size][0]


def test_is_solution_sees_a_repeated_digit() -> None:
    solution = made(9)[1]
    assert grids.is_solution(solution)
    changed = [solution[1], *solution[1:]]
    assert not grids.is_solution(changed)
    swapped = solution.copy()  # columns hold, a row and a box do not
    swapped[0], swapped[1] = swapped[1], swapped[0]
    assert not grids.is_solution(swapped)


# ------------------------------------------------------------------------------------ symmetry


@pytest.mark.parametrize("size", SIZES)
def test_augmentations_are_puzzles_of_the_same_class(size: int) -> None:
    puzzle, solution, _ = made(size)
    puzzles, solutions = sudoku.augment(
        np.array(puzzle), np.array(solution), 12, np.random.default_rng(0)
    )
    assert len({row.tobytes() for row in solutions}) > 6
    for one, answer in zip(puzzles.tolist(), solutions.tolist(), strict=True):
        assert grids.solve(one)[0] == [answer]
        assert grids.held_out_class(one, answer) == grids.held_out_class(puzzle, solution)
        assert grids.puzzle_class(one, answer) == grids.puzzle_class(puzzle, solution)
        assert grids.invariant(one) == grids.invariant(puzzle)


def test_4x4_has_two_classes_of_solutions_and_they_are_the_orbits() -> None:
    """Against the orbits themselves, made by applying every symmetry to every grid."""
    solutions, _ = grids.solve([0] * 16, limit=1000)
    lines = grids.line_orders(4, 2)
    orbits: dict[bytes, set[bytes]] = {}
    for solution in solutions:
        grid, orbit = np.array(solution).reshape(4, 4), set()
        for rows, columns in itertools.product(lines, lines):
            for turned in (grid[rows][:, columns], grid[rows][:, columns].T):
                names = np.argsort(turned[0])  # renamed so that the first row is 0 1 2 3
                orbit.add(names[turned - 1].astype(np.uint8).tobytes())
        orbits.setdefault(grids.canonical(solution)[0], orbit)
        assert min(orbit) == grids.canonical(solution)[0]
    assert len(orbits) == 2
    assert not set.intersection(*orbits.values())


def test_other_puzzles_are_of_other_classes() -> None:
    classes = {grids.held_out_class(*made(9, number)[:2]) for number in range(8)}
    assert len(classes) == 8
    assert len({grids.invariant(made(9, number)[0]) for number in range(8)}) == 8
    puzzle, solution, _ = made(9)
    more = [
        digit if place == puzzle.index(0) else puzzle[place] for place, digit in enumerate(solution)
    ]
    assert grids.held_out_class(more, solution) == grids.held_out_class(puzzle, solution)
    assert grids.puzzle_class(more, solution) != grids.puzzle_class(puzzle, solution)
    assert grids.invariant(more) != grids.invariant(puzzle)
    solution = made(4)[1]  # one solution, other givens
    assert grids.held_out_class([1] * 8 + [0] * 8, solution) != grids.held_out_class(
        [1] + [0] * 15, solution
    )


# ----------------------------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puzzles") / "sudoku"
    return sudoku.build(folder, generate=12, generate_test=4, num_aug=5, seed=3, workers=1)


def test_the_layout_on_disk(built: Path) -> None:
    for split, groups, puzzles in (("train", 12, 72), ("test", 4, 4)):
        described = json.loads((built / split / "dataset.json").read_text())
        assert described == {
            "pad_id": 0,
            "ignore_label_id": 0,
            "blank_identifier_id": 0,
            "vocab_size": 11,
            "seq_len": 81,
            "num_puzzle_identifiers": 1,
            "total_groups": groups,
            "mean_puzzle_examples": 1.0,
            "total_puzzles": puzzles,
            "sets": ["all"],
        }
        load = {path.stem: np.load(path) for path in (built / split).glob("*.npy")}
        assert load["all__inputs"].dtype == load["all__labels"].dtype == np.uint8
        assert load["all__inputs"].shape == load["all__labels"].shape == (puzzles, 81)
        assert load["all__puzzle_indices"].tolist() == list(range(puzzles + 1))
        assert load["all__group_indices"].tolist() == list(range(0, puzzles + 1, puzzles // groups))
        assert not load["all__puzzle_identifiers"].any()
        assert load["all__inputs"].min() == 1
        assert load["all__labels"].min() == 2
        assert load["all__labels"].max() == 10
    assert json.loads((built / "identifiers.json").read_text()) == ["<blank>"]
    manifest = read_manifest(built, "puzzles", make="")
    assert not damaged_files(built, manifest, hashes=True)
    assert manifest["counts"]["train"]["examples"] == 72


def test_each_group_is_one_puzzle_and_augmentations_of_it(built: Path) -> None:
    train = Split(built, "train")
    for start in range(0, 72, 6):
        rows = [(train.inputs[i] - 1, train.labels[i] - 1) for i in range(start, start + 6)]
        assert len({grids.held_out_class(puzzle, solution) for puzzle, solution in rows}) == 1
        for puzzle, solution in rows:
            assert grids.solve(puzzle.tolist())[0] == [solution.tolist()]


@pytest.mark.parametrize("size", SIZES)
def test_no_augmentation_of_a_training_puzzle_is_in_test(tmp_path: Path, size: int) -> None:
    folder = sudoku.build(
        tmp_path / "d", generate=30, generate_test=10, num_aug=4, size=size, workers=1
    )
    train, test = Split(folder, "train"), Split(folder, "test")
    classes = [
        {
            grids.held_out_class(q - 1, a - 1)
            for q, a in zip(split.inputs, split.labels, strict=True)
        }
        for split in (train, test)
    ]
    assert not classes[0] & classes[1]
    assert (len(train), len(test)) == (150, 10)


def test_the_same_bytes_for_any_number_of_workers(built: Path, tmp_path: Path) -> None:
    again = sudoku.build(tmp_path / "d", generate=12, generate_test=4, num_aug=5, seed=3, workers=2)
    other = sudoku.build(tmp_path / "e", generate=12, generate_test=4, num_aug=5, seed=4, workers=1)
    files = [read_manifest(path, "puzzles", make="")["files"] for path in (built, again, other)]
    assert files[0] == files[1]
    assert files[0]["train/all__inputs.npy"] != files[2]["train/all__inputs.npy"]


def test_a_generated_set_is_read_again_as_csv(built: Path, tmp_path: Path) -> None:
    again = sudoku.build(tmp_path / "d", source=built, num_aug=5, seed=3, workers=1)
    for split in ("train", "test"):
        for name in ("inputs", "labels"):
            path = Path(split) / f"all__{name}.npy"
            assert (again / path).read_bytes() == (built / path).read_bytes()


def write(folder: Path, train: list[list[str]], test: list[list[str]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    header = ["source", "question", "answer", "rating"]
    for name, rows in (("train", train), ("test", test or train[:1])):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return folder


def row(number: int, rating: int = 1) -> list[str]:
    puzzle, solution, _ = made(9, number)
    return [
        "x",
        "".join(map(str, puzzle)).replace("0", "."),
        "".join(map(str, solution)),
        f"{rating}",
    ]


def test_subsample_and_difficulty(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [row(n, rating=n) for n in range(8)], [row(20, 1), row(21, 9)])
    folder = sudoku.build(tmp_path / "a", source=source, min_difficulty=3, workers=1)
    assert (len(Split(folder, "train")), len(Split(folder, "test"))) == (5, 1)
    folder = sudoku.build(tmp_path / "b", source=source, subsample_size=3, workers=1)
    assert (len(Split(folder, "train")), len(Split(folder, "test"))) == (3, 2)
    with pytest.raises(DataError, match=r"train.csv holds no puzzles with a rating of 99 or more"):
        sudoku.build(tmp_path / "c", source=source, min_difficulty=99, workers=1)


def test_columns_may_have_short_names_and_any_order(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [row(0), row(1)], [row(2)])
    for name in ("train.csv", "test.csv"):
        with open(source / name, newline="") as file:
            rows = list(csv.reader(file))
        with open(source / name, "w", newline="") as file:
            csv.writer(file).writerows(
                [["rating", "a", "q", "source"], *(r[::-1] for r in rows[1:])]
            )
    assert len(Split(sudoku.build(tmp_path / "a", source=source, workers=1), "train")) == 2


def test_what_is_in_test_is_left_out_of_train(tmp_path: Path) -> None:
    question, answer = (np.array(sudoku.cells_of(text)) for text in row(1)[1:3])
    guise = sudoku.augment(question, answer, 1, np.random.default_rng(0))
    turned = ["x", *("".join(map(str, cells[0])) for cells in guise), "1"]
    assert turned[1] != row(1)[1].replace(".", "0")
    source = write(tmp_path / "s", [row(0), turned, row(2)], [row(1)])
    folder = sudoku.build(tmp_path / "a", source=source, workers=1)
    assert len(Split(folder, "train")) == 2
    counts = read_manifest(folder, "puzzles", make="")["counts"]["train"]
    assert counts["left out of train, since they are in test"] == 1
    with pytest.raises(DataError, match="All puzzles of train"):
        sudoku.build(tmp_path / "b", source=write(tmp_path / "t", [row(1)]), workers=1)


# ------------------------------------------------------------------------------------ bad input


def changed(column: int, change: object) -> list[str]:
    bad = row(1)
    bad[column] = change(bad[column])  # type: ignore[operator]
    return bad


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (changed(1, lambda q: q[:-1]), r"train.csv, line 3: the question has 80 characters"),
        (changed(2, lambda a: a + "1"), r"train.csv, line 3: the answer has 82 characters"),
        (changed(1, lambda q: q[:4] + "x" + q[5:]), r"line 3: character 5 of the question is 'x'"),
        (changed(2, lambda a: a[:80] + "?"), r"line 3: character 81 of the answer is '\?'"),
        (changed(3, lambda r: "hard"), r"line 3: the rating 'hard' is no number"),
        (row(1)[:3], r"line 3 has 3 columns instead of 4"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, bad: list[str], message: str) -> None:
    source = write(tmp_path / "s", [row(0), bad], [row(2)])
    with pytest.raises(DataError, match=message):
        sudoku.build(tmp_path / "a", source=source, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [row(0)], [row(2)])
    (source / "train.csv").write_text("source,question,rating\n")
    with pytest.raises(DataError, match=r"train.csv has no column answer; its first line is"):
        sudoku.build(tmp_path / "a", source=source, workers=1)
    (source / "train.csv").write_bytes(b"source,question,answer,rating\n\xff")
    with pytest.raises(DataError, match=r"train.csv is no CSV file in UTF-8"):
        sudoku.build(tmp_path / "a", source=source, workers=1)
    (source / "train.csv").unlink()
    with pytest.raises(DataError, match=r"has no train.csv"):
        sudoku.build(tmp_path / "a", source=source, workers=1)


def ambiguous() -> list[str]:
    question, answer = row(0)[1:3]
    return ["x", "." * 60 + question[60:], answer, "1"]


def other_answer() -> list[str]:
    return ["x", row(0)[1], row(1)[2], "1"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ambiguous, "with more than one solution"),
        (lambda: ["x", row(0)[1], row(0)[2][:80] + ".", "1"], "with an answer that is no solution"),
        (other_answer, "with an answer that changes a given"),
    ],
)
def test_unsound_puzzles_are_counted_or_refused(
    tmp_path: Path, bad: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(n) for n in range(2, 8)]
    source = write(tmp_path / "s", [*rows, bad()], [row(1)])  # type: ignore[operator]
    with pytest.raises(DataError, match=f"1 of 7 puzzles are not sound, the first {reason}"):
        sudoku.build(tmp_path / "a", source=source, workers=1)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(tables, "MAX_BAD_SHARE", 0.2)
    folder = sudoku.build(tmp_path / "a", source=source, workers=1)
    assert len(Split(folder, "train")) == 6
    assert read_manifest(folder, "puzzles", make="")["counts"]["train"][reason] == 1


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, built: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and holds something else"):
        sudoku.build(tmp_path / "a", generate=2, workers=1)
    assert (tmp_path / "a" / "mine.txt").read_text() == "mine"
    before = (built / "manifest.json").read_bytes()
    sudoku.build(built, generate=12, generate_test=4, num_aug=5, seed=3, workers=1)  # it is there
    with pytest.raises(ConfigError, match="exists and holds something else"):
        sudoku.build(built, generate=12, generate_test=4, num_aug=5, seed=4, workers=1)
    assert (built / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generate": 5, "size": 5}, "size must be 4, 6 or 9, not 5"),
        ({"generate": 0}, "Both splits need a puzzle: train 0"),
        ({"generate": 3, "generate_test": 0}, "Both splits need a puzzle: train 3, test 0"),
        ({"generate": 3, "seed": -1}, "seed must be 0 or more, not -1"),
        ({"size": 4}, "for generated puzzles"),
        ({"generate": 3, "num_aug": -1}, "num_aug must be 0 or more"),
        ({"generate": 3, "size": 4, "min_difficulty": 500}, "Ask for fewer, larger or easier ones"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sudoku.build(tmp_path / "a", workers=1, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
