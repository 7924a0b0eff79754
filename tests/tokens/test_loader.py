"""The order of the data: a function of seed and place, every window once an epoch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from thimble.errors import DataError
from thimble.tokens.loader import Windows, permute


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    for key in (0, 1, 2**40):
        image = permute(np.arange(size), size, key)
        assert sorted(image.tolist()) == list(range(size))


def test_keys_and_places_matter() -> None:
    first, second = (permute(np.arange(1000), 1000, key) for key in (1, 2))
    assert (first == second).mean() < 0.02
    assert (first == np.arange(1000)).mean() < 0.02
    # Neighbours are torn apart: a window is seldom followed by the next one.
    assert (np.diff(first) == 1).mean() < 0.02


def windows(count: int = 53, length: int = 8, seed: int = 1) -> Windows:
    return Windows(np.arange(count * length + 4, dtype=np.uint16), length, seed)


def test_every_window_once_per_epoch_and_every_token_a_target_once() -> None:
    data = windows()
    for epoch in range(3):
        order = data.order(epoch * data.count, data.count)
        assert sorted(order.tolist()) == list(range(data.count))
    inputs, targets = data.batch(0, data.count)
    assert np.array_equal(np.sort(targets.ravel()), np.arange(1, 53 * 8 + 1))
    assert np.array_equal(inputs + 1, targets)
    assert data.tail == 3


def test_epochs_differ_and_seeds_differ() -> None:
    data = windows()
    first, second = data.order(0, 53), data.order(53, 53)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, windows(seed=2).order(0, 53))


@pytest.mark.parametrize("sizes", [[32], [8] * 4, [1] * 32, [5, 20, 7]])
def test_the_order_does_not_depend_on_how_it_is_read(sizes: list[int]) -> None:
    data, place, read = windows(), 40, []  # crosses the end of the first epoch
    for size in sizes:
        read.append(data.batch(place, size)[0])
        place += size
    assert np.array_equal(np.concatenate(read), data.batch(40, 32)[0])


def test_the_order_never_changes_between_versions() -> None:
    """A published run can be repeated only if the order is part of the promise."""
    order = windows(count=1000, length=4, seed=7).order(0, 32_000)
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    assert digest == "463550471717e361266e7d43c9cd3af0499a41c5d456c088b7c3287cf381ca29"


def test_any_place_is_found_without_walking_there() -> None:
    data = windows()
    far = 10**12 // 53 * 53
    assert sorted(data.order(far, 53).tolist()) == list(range(53))


def test_less_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="less than one window"):
        Windows(np.arange(8, dtype=np.uint16), 8, 1)
    assert Windows(np.arange(9, dtype=np.uint16), 8, 1).count == 1
