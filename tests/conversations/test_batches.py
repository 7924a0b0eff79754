from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conversations.conftest import records
from thimble import api
from thimble.conversations.batches import MULTIPLE, POOL, Batches, gather
from thimble.conversations.dataset import Conversations
from thimble.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Conversations:
    import json

    folder = tmp_path_factory.mktemp("data")
    rows = records(700)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = api.build_conversations(
        folder / "a.jsonl",
        tokenizer=tokenizer_folder,
        output=folder / "out",
        workers=1,
        seq_len=200,
        system_message="",
    )
    return Conversations(built.path)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [1, 3, 8, 29])
def test_every_example_comes_exactly_once_an_epoch(
    data: Conversations, split: str, size: int
) -> None:
    batches = Batches(data, split, batch_size=size, seed=3, epochs=2)
    seen: list[list[int]] = [[], []]
    for batch in batches:
        seen[(batches.place - 1) // batches.count] += batch.examples.tolist()
        assert len(batch) == size or batches.place % batches.count == 0  # only an epoch's last
    for epoch in seen:
        assert sorted(epoch) == data.split(split).tolist()
    assert seen[0] != seen[1]
    assert batches.left(1) == 0
    assert len(batches.rows(5)) == 0


def test_the_order_is_a_function_of_seed_and_place(data: Conversations) -> None:
    def order(seed: int, sizes: list[int]) -> list[int]:
        batches = Batches(data, batch_size=4, seed=seed, epochs=3)
        return [int(e) for size in sizes for e in batches.rows(size).examples]

    rng = np.random.default_rng(0)
    whole = order(1, [2100])
    sizes = rng.integers(0, 40, 60).tolist()
    assert order(1, sizes) == whole[: sum(sizes)]
    assert order(2, [2100]) != whole
    for place in (1, 127, 128, 650, 700, 1400):
        resumed = Batches(data, batch_size=4, seed=1, epochs=3, place=place)
        assert resumed.rows(50).examples.tolist() == whole[place : place + 50]


def test_batches_after_resuming_are_those_that_would_have_come(data: Conversations) -> None:
    straight = Batches(data, batch_size=16, epochs=2)
    batches = list(straight)
    place = sum(len(batch) for batch in batches[:30])
    again = list(Batches(data, batch_size=16, epochs=2, place=place))
    assert len(again) == len(batches) - 30
    for one, other in zip(batches[30:], again, strict=True):
        assert np.array_equal(one.inputs, other.inputs)
        assert np.array_equal(one.labels, other.labels)
    assert len(batches) == 2 * straight.batches_per_epoch


def test_buckets_pad_little(data: Conversations) -> None:
    batches = Batches(data, batch_size=8)
    inputs = list(batches)
    real = sum(int(batch.lengths.sum()) for batch in inputs)
    share = 1 - real / sum(batch.inputs.size for batch in inputs)
    assert batches.padding()["bucketed"] == pytest.approx(share)
    shuffled = np.random.default_rng(0).permutation(data.split("train"))
    random = [gather(data, shuffled[i : i + 8]) for i in range(0, len(shuffled), 8)]
    assert share < 0.6 * np.mean([batch.padding for batch in random])
    assert batches.padding()["fixed_width"] > 3 * share
    assert all(batch.inputs.shape[1] % MULTIPLE == 0 for batch in inputs)
    # Batches come in no order of length.
    widths = [batch.inputs.shape[1] for batch in inputs if len(batch) == 8][:POOL]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)


def test_rows_of_a_given_width(data: Conversations) -> None:
    batches = Batches(data, batch_size=8)
    assert batches.rows(3, width=200).inputs.shape == (3, 200)
    with pytest.raises(ValueError, match="does not fit into 2"):
        batches.rows(3, width=2)


def test_weights_come_with_their_examples(
    tokenizer_folder: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [row | {"weight": 1 + i} for i, row in enumerate(records(20))]
    built = api.build_conversations(
        jsonl(rows),
        tokenizer=tokenizer_folder,
        output=tmp_path / "o",
        workers=1,
        test_ratio=0.0,
        val_ratio=0.0,
    )
    batch = Batches(Conversations(built.path), batch_size=20).batch()
    assert batch.weights.dtype == np.float32
    assert (batch.weights == batch.examples + 1).all()


def test_a_batch_larger_than_the_data_is_refused(data: Conversations) -> None:
    count = len(data.split("train"))
    with pytest.raises(DataError, match=rf"subset_size(.|\n)*global_batch_size={count}"):
        Batches(data, batch_size=count + 1)
    assert len(Batches(data, "test", batch_size=1000).batch()) == len(data.split("test"))
    with pytest.raises(DataError, match="no split 'dev'"):
        Batches(data, "dev", batch_size=1)
