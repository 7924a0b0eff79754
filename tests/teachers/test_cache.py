"""The cache: what is read is what the teacher said, in any order, after any interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers_training import token_directory
from tests.teachers.helpers import LENGTH, examples, make_teacher
from thimble import inspection
from thimble.errors import DataError, EnvironmentProblem
from thimble.objectives.sparse_kl import linear_sparse_kl
from thimble.objectives.sparse_targets import SampledTargets, SparseTargets
from thimble.teachers import Asked, Targets, cache
from thimble.teachers.cache import CachedTeacher, RecordingTeacher, TeacherCache
from thimble.teachers.direct import DirectTeacher, open_direct
from thimble.teachers.fill import fill

ASKED = Asked(8, (1.0, 2.0, 0.5))
DRAWN = Asked(16, (2.0,), sampled=True)
HALF_ULP = 2.0**-11  # of float16, relative


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def direct(folder: Path, asked: Asked = ASKED) -> DirectTeacher:
    device = torch.device("cpu")
    return open_direct(folder, examples(), asked, device=device, precision="float32")


def inputs_of(numbers: Sequence[int]) -> Tensor:
    return torch.from_numpy(examples().rows(numbers).inputs)


def ask(teacher: Any, numbers: Sequence[int]) -> Targets:
    return teacher.targets(numbers, inputs_of(numbers))


class Counted:
    """A teacher that notes the rows it is asked for."""

    def __init__(self, teacher: DirectTeacher, *, fail_after: int | None = None) -> None:
        self.teacher, self.asked, self.identity = teacher, teacher.asked, teacher.identity
        self.rows: list[int] = []
        self.fail_after = fail_after

    def targets(self, numbers: Sequence[int], *rest: Any) -> Targets:
        if self.fail_after is not None and len(self.rows) >= self.fail_after:
            raise KeyboardInterrupt
        self.rows += numbers
        return self.teacher.targets(numbers, *rest)


def assert_kept(mine: Targets, theirs: Targets) -> None:
    assert torch.equal(mine.indices, theirs.indices)
    off = (mine.log_probs - theirs.log_probs).abs()
    assert (off <= HALF_ULP * theirs.log_probs.abs() + 1e-7).all()
    if isinstance(mine, SparseTargets):
        assert isinstance(theirs, SparseTargets)
        assert torch.equal(mine.log_tail, theirs.log_tail)
        assert mine.temperatures == theirs.temperatures
    else:
        assert isinstance(theirs, SampledTargets)
        assert torch.equal(mine.weights, theirs.weights)
        assert mine.temperature == theirs.temperature


def student_loss(targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss a position of some student, and its gradient towards the head."""
    draw = torch.Generator().manual_seed(5)
    shape = targets.indices.shape[:2]
    hidden = torch.randn(*shape, 24, generator=draw)
    head = (torch.randn(examples().vocab_size, 24, generator=draw) * 0.5).requires_grad_()
    labels = torch.zeros(shape, dtype=torch.int64)
    loss = linear_sparse_kl(hidden, head, labels, targets, alpha=0.0, temperature=temperature).loss
    loss = loss / labels.numel()
    loss.backward()
    assert head.grad is not None
    return loss.detach(), head.grad


# --- equal to the teacher


@pytest.mark.parametrize("asked", [ASKED, DRAWN])
def test_the_cache_says_what_the_teacher_says_and_the_losses_agree(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    monkeypatch.setattr(cache, "SHARD_BYTES", 20_000)  # several shards
    teacher = direct(folder, asked)
    filled = fill(tmp_path / "c", examples(), teacher, batch_positions=50)
    assert len(list((tmp_path / "c").glob("shard-*.bin"))) > 2
    assert filled.rows == examples().count == filled.asked_now
    size = 8 * 4 + 3 * 4 if asked is ASKED else 16 * 4
    assert filled.bytes_per_position == size
    total = sum(file.stat().st_size for file in (tmp_path / "c").glob("shard-*.bin"))
    assert total == filled.bytes == size * LENGTH * examples().count

    cached = CachedTeacher(tmp_path / "c", examples(), asked, teacher.identity)
    numbers = [examples().count - 1, 0, 17, 3]
    mine, theirs = ask(cached, numbers), ask(teacher, numbers)
    assert_kept(mine, theirs)
    for temperature in asked.temperatures:
        (loss, grad), (expected, wanted) = (student_loss(t, temperature) for t in (mine, theirs))
        # sum of p |log p| is at most ln V; T^2 and 1/T as the loss has them.
        bound = HALF_ULP * np.log(examples().vocab_size) * temperature**2 * max(1, 1 / temperature)
        assert abs(loss - expected) <= 4 * bound
        assert (grad - wanted).norm() <= 4 * HALF_ULP * wanted.norm() * max(1, 1 / temperature)


def test_a_whole_vocabulary_has_no_tail_and_small_probabilities_stay(
    tmp_path: Path, folder: Path
) -> None:
    teacher = direct(folder, Asked(examples().vocab_size, (1.0,)))
    keep = RecordingTeacher(teacher, tmp_path / "c", examples())
    theirs = ask(keep, [4])
    mine = ask(keep, [4])
    assert_kept(mine, theirs)
    assert isinstance(mine, SparseTargets)
    assert torch.isneginf(mine.log_tail).all()


def test_ids_take_four_bytes_where_the_vocabulary_needs_them(tmp_path: Path) -> None:
    class Large:
        directory, count, length, vocab_size = Path("x"), 3, 2, 128_256
        identity: dict[str, Any] = {"of": "made up"}  # noqa: RUF012
        tokenizer: Any = type("T", (), {"fingerprint": "f"})

    asked = Asked(2, (1.0,))
    kept = TeacherCache.create(tmp_path, Large(), {"weights": "w"}, asked)  # type: ignore[arg-type]
    assert kept.position_bytes == 4 + 2 * (4 + 2)
    draw = torch.Generator().manual_seed(0)
    targets = SparseTargets(
        torch.randint(65_536, 128_256, (3, 2, 2), generator=draw),
        -torch.rand(3, 2, 2, generator=draw),
        -torch.rand(3, 2, 1, generator=draw),
        (1.0,),
    )
    kept.write([0, 1, 2], targets)
    parts = (targets.indices, targets.log_probs, targets.log_tail)
    assert_kept(kept.read([2, 0, 1]), SparseTargets(*(x[[2, 0, 1]] for x in parts), (1.0,)))


def test_a_larger_cache_serves_fewer_tokens_and_temperatures(tmp_path: Path, folder: Path) -> None:
    fill(tmp_path / "c", examples(), direct(folder))
    for k, temperatures in ((3, (2.0,)), (8, (0.5, 1.0)), (1, (1.0, 2.0, 0.5))):
        less = Asked(k, temperatures)
        mine = ask(CachedTeacher(tmp_path / "c", examples(), less), [2, 9])
        theirs = ask(direct(folder, less), [2, 9])
        assert isinstance(mine, SparseTargets)
        assert isinstance(theirs, SparseTargets)
        assert torch.equal(mine.indices, theirs.indices)
        for temperature in temperatures:
            for one, other in zip(mine.at(temperature), theirs.at(temperature), strict=True):
                torch.testing.assert_close(one, other, atol=0.01, rtol=0.01)
    fill(tmp_path / "d", examples(), direct(folder, DRAWN))
    fewer = ask(CachedTeacher(tmp_path / "d", examples(), Asked(4, (2.0,), sampled=True)), [2])
    assert isinstance(fewer, SampledTargets)
    assert torch.equal(fewer.weights, torch.full((1, LENGTH, 4), 0.25))
    with pytest.raises(DataError, match="it holds"):
        CachedTeacher(tmp_path / "c", examples(), Asked(9, (1.0,)))
    with pytest.raises(DataError, match="it holds"):
        CachedTeacher(tmp_path / "c", examples(), Asked(8, (3.0,)))
    with pytest.raises(DataError, match="it holds"):
        CachedTeacher(tmp_path / "c", examples(), Asked(8, (1.0,), sampled=True))


# --- filled as it goes, interrupted, killed


def test_a_direct_run_fills_the_cache_and_does_not_ask_twice(tmp_path: Path, folder: Path) -> None:
    teacher = Counted(direct(folder))
    keep = RecordingTeacher(teacher, tmp_path / "c", examples())
    order = np.random.default_rng(0).permutation(examples().count)
    for begin in range(0, 12, 4):
        ask(keep, order[begin : begin + 4].tolist())
    assert sorted(teacher.rows) == sorted(order[:12].tolist())
    with pytest.raises(DataError, match=r"not in the cache(.|\n)*12 of"):
        ask(CachedTeacher(tmp_path / "c", examples(), ASKED), [int(order[12])])
    again = RecordingTeacher(teacher, tmp_path / "c", examples())
    assert_kept(ask(again, order[:4].tolist()), ask(direct(folder), order[:4].tolist()))
    assert len(teacher.rows) == 12
    filled = fill(tmp_path / "c", examples(), teacher)  # the verb does the rest
    assert filled.asked_now == examples().count - 12
    assert sorted(teacher.rows) == list(range(examples().count))


def test_several_processes_of_a_run_fill_one_cache(tmp_path: Path, folder: Path) -> None:
    teacher = direct(folder)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / cache.INDEX).touch()  # another process is a moment ahead
    one = RecordingTeacher(teacher, tmp_path / "c", examples())
    other = RecordingTeacher(teacher, tmp_path / "c", examples())
    ask(one, [0, 2])
    ask(other, [1, 3])
    kept = CachedTeacher(tmp_path / "c", examples(), ASKED)
    assert_kept(ask(kept, [0, 1, 2, 3]), ask(teacher, [0, 1, 2, 3]))


def test_an_interrupted_cache_goes_on_and_is_sealed_at_the_end(
    tmp_path: Path, folder: Path
) -> None:
    teacher = Counted(direct(folder), fail_after=10)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "c", examples(), teacher, batch_positions=5 * LENGTH)
    assert not (tmp_path / "c" / "manifest.json").exists()
    teacher.fail_after = None
    filled = fill(tmp_path / "c", examples(), teacher, batch_positions=5 * LENGTH)
    assert filled.asked_now == examples().count - 10
    assert sorted(teacher.rows) == list(range(examples().count))
    assert inspection.inspect(tmp_path / "c")["state"].startswith("complete")
    assert fill(tmp_path / "c", examples(), teacher).asked_now == 0


KILLED = """
import sys, time
from pathlib import Path
from tests.teachers.test_cache import Counted, direct, examples
from thimble.teachers.fill import fill
class Slow(Counted):
    def targets(self, *rest):
        time.sleep(0.02)
        return super().targets(*rest)
fill(sys.argv[1], examples(), Slow(direct(Path(sys.argv[2]))), batch_positions=1)
"""


def test_a_killed_process_leaves_whole_rows_only(tmp_path: Path, folder: Path) -> None:
    environment = {**os.environ, "THIMBLE_TEST_TOKENS": token_directory()}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "c"), str(folder)], env=environment
    )
    index = tmp_path / "c" / cache.INDEX
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if index.exists() and (np.fromfile(index, "<u8") > 0).sum() >= 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = np.flatnonzero(TeacherCache(tmp_path / "c").filled(np.arange(examples().count)))
    assert 5 <= len(there) < examples().count
    kept = CachedTeacher(tmp_path / "c", examples(), ASKED)
    assert_kept(ask(kept, there.tolist()), ask(direct(folder), there.tolist()))
    teacher = Counted(direct(folder))
    fill(tmp_path / "c", examples(), teacher)
    assert not set(teacher.rows) & set(there.tolist())


# --- what is damaged or does not belong


def test_a_damaged_row_is_noticed_and_asked_again(tmp_path: Path, folder: Path) -> None:
    teacher = Counted(direct(folder))
    fill(tmp_path / "c", examples(), teacher)
    before = ask(CachedTeacher(tmp_path / "c", examples(), ASKED), [6])
    shard = tmp_path / "c" / "shard-00000.bin"
    row = LENGTH * (8 * 4 + 3 * 4)
    with open(shard, "r+b") as file:
        file.seek(6 * row + 100)
        byte = file.read(1)
        file.seek(6 * row + 100)
        file.write(bytes([byte[0] ^ 1]))
    damaged = CachedTeacher(tmp_path / "c", examples(), ASKED)
    with pytest.raises(DataError, match=r"Row 6 in .*shard-00000\.bin is damaged"):
        ask(damaged, [6])
    ask(damaged, [5])
    teacher.rows.clear()
    assert fill(tmp_path / "c", examples(), teacher).asked_now == 1
    assert teacher.rows == [6]
    assert_kept(ask(CachedTeacher(tmp_path / "c", examples(), ASKED), [6]), before)
    assert inspection.inspect(tmp_path / "c")["state"].startswith("complete")


def test_a_shard_cut_off_is_noticed_and_asked_again(tmp_path: Path, folder: Path) -> None:
    teacher = Counted(direct(folder))
    fill(tmp_path / "c", examples(), teacher)
    shard = tmp_path / "c" / "shard-00000.bin"
    os.truncate(shard, shard.stat().st_size - 5000)
    with pytest.raises(DataError, match="missing or cut off"):
        ask(CachedTeacher(tmp_path / "c", examples(), ASKED), [0])
    fill(tmp_path / "c", examples(), teacher)
    everything = list(range(examples().count))
    assert_kept(
        ask(CachedTeacher(tmp_path / "c", examples(), ASKED), everything),
        ask(direct(folder), everything),
    )


def test_a_cache_that_does_not_belong_is_refused(tmp_path: Path, folder: Path) -> None:
    teacher = direct(folder)
    fill(tmp_path / "c", examples(), teacher)
    other = make_teacher(tmp_path / "other", seed=1)
    for wrong in (
        lambda: CachedTeacher(tmp_path / "c", examples(), ASKED, direct(other).identity),
        lambda: RecordingTeacher(direct(other), tmp_path / "c", examples()),
        lambda: fill(tmp_path / "c", examples(), direct(other)),
    ):
        with pytest.raises(DataError, match="another teacher or adapter"):
            wrong()
    for rows in (examples("val"), examples(length=LENGTH - 1)):
        with pytest.raises(DataError, match="other data, another split or another row length"):
            CachedTeacher(tmp_path / "c", rows, ASKED, teacher.identity)
    with pytest.raises(DataError, match="it holds"):
        RecordingTeacher(direct(folder, Asked(4, (1.0,))), tmp_path / "c", examples())

    said = json.loads((tmp_path / "c" / "cache.json").read_text())
    (tmp_path / "c" / "cache.json").write_text(json.dumps(said | {"tokenizer": "another"}))
    with pytest.raises(DataError, match="another tokenizer"):
        CachedTeacher(tmp_path / "c", examples(), ASKED, teacher.identity)
    (tmp_path / "c" / "cache.json").write_text(json.dumps({"kind": "teacher-cache"}))
    with pytest.raises(DataError, match="not the description of a cache"):
        CachedTeacher(tmp_path / "c", examples(), ASKED)
    with pytest.raises(DataError, match="no teacher cache"):
        CachedTeacher(tmp_path / "nothing", examples(), ASKED)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        fill(tmp_path / "full", examples(), teacher)


def test_a_disk_without_room_is_said_first(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(EnvironmentProblem, match="GiB free"):
        fill(tmp_path / "c", examples(), direct(folder))
