from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.puzzles import arc_files
from thimble.artifacts import atomic_directory, write_manifest
from thimble.errors import ConfigError, DataError
from thimble.puzzles import arc, sudoku
from thimble.puzzles.dataset import Group, SplitWriter
from thimble.puzzles.loader import IGNORE, Place, Rows, Split, Stream, evaluation_batches


def dataset(folder: Path, groups: list[list[int]]) -> Path:
    """A data set of the groups given as sizes of puzzles; the inputs are the example's number."""
    with atomic_directory(folder) as new:
        for name in ("train", "test"):
            writer, first, identifier = SplitWriter(new / name, 3, 250), 0, 0
            for sizes in groups:
                numbers = np.arange(first, first + sum(sizes))
                inputs = np.repeat(numbers[:, None], 3, axis=1)
                labels = inputs + np.array([[100, 0, 100]])  # the second is ignored where it is 0
                identifiers = range(identifier, identifier + len(sizes))
                writer.add(Group(inputs, labels, sizes, identifiers))
                first, identifier = first + sum(sizes), identifier + len(sizes)
            writer.close(identifier)
        write_manifest(new, "puzzles", inputs=[], options={}, counts={})
    return folder


SIZES = [[2, 2, 2], [1, 1], [3, 4], [5], [2]]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return Split(dataset(tmp_path_factory.mktemp("loader") / "d", SIZES), "train")


def same(one: Rows, other: Rows) -> bool:
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in Rows.__annotations__)


def test_an_epoch_has_one_puzzle_of_each_group_with_all_its_examples(split: Split) -> None:
    chosen: list[set[int]] = [set() for _ in SIZES]
    orders = set()
    for epoch in range(60):
        order = split.order(1, epoch)
        assert len(set(order)) == len(order)
        puzzles = np.searchsorted(split.puzzles, order, side="right") - 1
        together = [int(p) for i, p in enumerate(puzzles) if i == 0 or p != puzzles[i - 1]]
        assert len(together) == len(SIZES)  # the examples of a puzzle follow one another
        groups = np.searchsorted(split.groups, together, side="right") - 1
        assert sorted(groups) == list(range(len(SIZES)))
        for group, puzzle in zip(groups, together, strict=True):
            chosen[group].add(puzzle)
            assert (puzzles == puzzle).sum() == split.sizes[puzzle]
        orders.add(tuple(order))
    assert [len(puzzles) for puzzles in chosen] == [len(sizes) for sizes in SIZES]  # each in time
    assert len(orders) == 60
    assert tuple(split.order(1, 7)) in orders
    assert (split.order(1, 7) != split.order(2, 7)[: len(split.order(1, 7))]).any()


def test_examples_of_a_puzzle_are_shuffled(split: Split) -> None:
    inside = {tuple(o[(o >= 15) & (o < 20)]) for o in (split.order(0, e) for e in range(200))}
    assert len(inside) > 80  # of 120 orders of five


def test_however_the_calls_are_cut_the_same_rows_come(split: Split) -> None:
    whole = Stream(split, seed=5).rows(100)
    stream, draw = Stream(split, seed=5), np.random.default_rng(0)
    got = np.empty(0, dtype=np.int64)
    while len(got) < 100:
        rows = stream.rows(int(min(draw.integers(0, 9), 100 - len(got))))
        assert rows.inputs.shape == (len(rows.examples), 3)
        got = np.append(got, rows.examples)
    assert (got == whole.examples).all()
    epochs = [split.order(5, epoch) for epoch in range(20)]
    assert (whole.examples == np.concatenate(epochs)[:100]).all()


def test_a_stream_goes_on_from_any_place(split: Split) -> None:
    for seen in range(0, 60, 7):
        first = Stream(split, seed=3)
        first.rows(seen)
        again = Stream(split, seed=3, place=first.place)
        assert same(first.rows(25), again.rows(25))
        assert first.place == again.place
    with pytest.raises(ConfigError, match="Epoch 0 has no place 99"):
        Stream(split, seed=3, place=Place(0, 99))


def test_processes_share_the_order(split: Split) -> None:
    epoch = split.order(4, 0)
    parts = [Stream(split, 4, rank=rank, processes=3) for rank in range(3)]
    taken = [part.rows(len(epoch[part.rank :: 3])).examples for part in parts]
    assert sorted(np.concatenate(taken)) == sorted(epoch)
    assert all((one == epoch[rank::3]).all() for rank, one in enumerate(taken))
    with pytest.raises(ConfigError, match="40 processes are more than the examples"):
        Stream(split, 4, rank=39, processes=40)


def test_rows_are_those_of_the_arrays(split: Split) -> None:
    rows = split.rows(np.array([6, 0, -1, 15]))
    assert rows.inputs.tolist() == [[6] * 3, [0] * 3, [0] * 3, [15] * 3]
    assert rows.labels.tolist() == [
        [106, 6, 106],
        [100, IGNORE, 100],
        [IGNORE] * 3,
        [115, 15, 115],
    ]
    assert rows.puzzle_identifiers.tolist() == [3, 0, 0, 7]
    assert {getattr(rows, name).dtype for name in Rows.__annotations__} == {np.dtype(np.int64)}


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 22, 50])
def test_evaluation_sees_every_example_once(split: Split, size: int, processes: int) -> None:
    ranks = [list(evaluation_batches(split, size, rank, processes)) for rank in range(processes)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [rows for batches in ranks for rows in batches]
    assert {len(batch.examples) for batch in rows} == {size}
    examples = np.concatenate([batch.examples for batch in rows])
    assert sorted(examples[examples >= 0]) == list(range(len(split)))
    for batch in rows:
        assert (batch.labels[batch.examples < 0] == IGNORE).all()
    with pytest.raises(ConfigError, match="at least one row"):
        next(evaluation_batches(split, 0))


def test_real_data_sets(tmp_path: Path) -> None:
    prefix = arc_files.make(tmp_path / "f")
    folder = arc.build(
        tmp_path / "a", input_file_prefix=prefix, subsets=["training", "evaluation"], num_aug=4
    )
    split = Split(folder, "train")
    rows = Stream(split, seed=0).rows(40)
    assert rows.inputs.max() == 11
    assert ((rows.labels == IGNORE) | (rows.labels >= 1)).all()
    assert (rows.labels != IGNORE).any(axis=1).all()
    assert set(rows.puzzle_identifiers) <= set(range(1, 26))
    # Of five tasks with 4, 4, 4, 3, 3 pairs an epoch has 18 examples and five identifiers.
    assert len(set(rows.puzzle_identifiers[:18])) == 5
    grids = Split(sudoku.build(tmp_path / "s", generate=3, size=4, workers=1), "train")
    assert (Stream(grids, seed=0).rows(5).labels >= 2).all()


def test_a_data_set_of_the_other_programs_is_read(tmp_path: Path, split: Split) -> None:
    """Theirs has no manifest, and the older ones no total_puzzles."""
    folder = dataset(tmp_path / "d", SIZES)
    (folder / "manifest.json").unlink()
    described = json.loads((folder / "train" / "dataset.json").read_text())
    del described["total_puzzles"]
    (folder / "train" / "dataset.json").write_text(json.dumps(described))
    assert same(Stream(Split(folder, "train"), 1).rows(30), Stream(split, 1).rows(30))


def test_what_is_no_data_set(tmp_path: Path, split: Split) -> None:
    with pytest.raises(DataError, match=r"There are no puzzles at .*x/train"):
        Split(tmp_path / "x", "train")
    folder = dataset(tmp_path / "d", SIZES)
    with pytest.raises(DataError, match=r"There are no puzzles at .*d/val"):
        Split(folder, "val")
    np.save(folder / "train" / "all__labels.npy", np.zeros((3, 3), np.uint8))
    with pytest.raises(DataError, match="do not fit one another"):
        Split(folder, "train")
    (folder / "train" / "all__labels.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"all__labels\.npy is missing or damaged"):
        Split(folder, "train")
    (folder / "train" / "dataset.json").write_text('{"pad_id": 0}')
    with pytest.raises(DataError, match=r"dataset\.json has no ignore_label_id"):
        Split(folder, "train")
    (folder / "train" / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match=r"dataset\.json describes no data set"):
        Split(folder, "train")
