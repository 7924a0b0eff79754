"""A resumed run is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import helpers_training as helpers
from thimble.config.load import load_run
from thimble.errors import DataError, EnvironmentProblem, Interrupted
from thimble.training import checkpoint, train
from thimble.training.loop import Trainer
from thimble.training.run import RunFolder

# An epoch of 5 steps, so that 12 steps reach into the third.
EPOCHS = ["training.micro_batch_size=20"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = train(helpers.config(tmp_path_factory.mktemp("whole"), *EPOCHS))
    assert run.status == "finished"
    assert run.metrics[-2]["step"] == 12
    epochs = [record["epoch"] for record in run.metrics if "epoch" in record]
    assert epochs[0] < 1 < epochs[-1]
    return run.path


def interrupt_after(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Deliver a real SIGTERM to this process after each of these steps."""
    inner = Trainer.step
    left = list(steps)

    def step(self: Trainer) -> None:
        inner(self)
        if left and self.state.step == left[0]:
            left.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "step", step)


def assert_same(run: Path, whole: Path) -> None:
    mine, theirs = (helpers.state_of(path / "checkpoints" / "step-000012") for path in (run, whole))
    assert mine == theirs
    assert helpers.timeless(run) == helpers.timeless(whole)
    for pointer in ("best", "latest"):
        assert RunFolder(run).pointed(pointer).name == RunFolder(whole).pointed(pointer).name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param((1,), id="in warm-up"),
        pytest.param((3,), id="at a record"),
        pytest.param((4,), id="at an evaluation and a checkpoint"),
        pytest.param((5,), id="between two records"),
        pytest.param((7,), id="in the second epoch"),
        pytest.param((2, 8), id="after a second resume"),
        pytest.param((11,), id="before the last step"),
    ],
)
def test_resumed_equals_uninterrupted(
    cuts: tuple[int, ...], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, *cuts)
    config, run = helpers.config(tmp_path, *EPOCHS), None
    for cut in cuts:
        with pytest.raises(Interrupted, match=f"saved at step {cut}"):
            train(config, resume=run)
        run = next((tmp_path / "slm_nano").iterdir())
    assert run is not None
    train(config, resume=run)
    assert_same(run, uninterrupted)


CHILD = """
import sys
from pathlib import Path
from tests import helpers_training as helpers
from thimble.training import train, checkpoint
import os, signal
write = checkpoint.artifacts.write_manifest
def killed(directory, *args, **kwargs):
    if "step-000008" in str(directory):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(directory, *args, **kwargs)
checkpoint.artifacts.write_manifest = killed
train(helpers.config(Path(sys.argv[1]), "training.micro_batch_size=20"))
"""


def test_killed_in_the_middle_of_a_save(uninterrupted: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    run = next((tmp_path / "slm_nano").iterdir())
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert "step-000004" in names
    assert "step-000008" not in names
    train(helpers.config(tmp_path, *EPOCHS), resume=run)
    assert_same(run, uninterrupted)
    assert not list((run / "checkpoints").glob(".incomplete*"))


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    return train(helpers.config(tmp_path, *EPOCHS, "training.max_steps=8")).path


@pytest.mark.parametrize(
    "damage",
    ["truncate model.safetensors", "flip optimizer.pt", "remove manifest.json", "remove rng.pt"],
)
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, two_checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how, name = damage.split()
    file = two_checkpoints / "checkpoints" / "step-000008" / name
    content = bytearray(file.read_bytes())
    if how == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    found = checkpoint.newest_valid(two_checkpoints / "checkpoints")
    assert found.name == "step-000004"
    assert "step-000008 is not usable" in caplog.text
    assert name in caplog.text
    # Training goes on from the good one and replaces the damaged one.
    train(helpers.config(two_checkpoints, *EPOCHS, "training.max_steps=8"), resume=two_checkpoints)
    assert not checkpoint.problems(two_checkpoints / "checkpoints" / "step-000008")


def test_no_usable_checkpoint_says_so(two_checkpoints: Path) -> None:
    for directory in (two_checkpoints / "checkpoints").glob("step-*"):
        (directory / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="no usable checkpoint"):
        checkpoint.newest_valid(two_checkpoints / "checkpoints")


def test_a_pickle_in_optimizer_pt_is_not_run(two_checkpoints: Path, tmp_path: Path) -> None:
    import torch

    witness = tmp_path / "opened"

    class Trap:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (witness,))

    torch.save({"state": Trap()}, tmp_path / "optimizer.pt")
    with pytest.raises(DataError, match="damaged or not a plain torch file"):
        checkpoint.unpickle_safely(tmp_path / "optimizer.pt")
    assert not witness.exists()


def test_other_data_window_seed_or_model_is_refused(two_checkpoints: Path) -> None:
    for override, error in (
        ("training.sequence_length=8", "sequence_length"),
        ("seed=2", "seed"),
        ("model.intermediate_size=48", "another model"),
    ):
        config = helpers.config(two_checkpoints.parent.parent, *EPOCHS, override)
        with pytest.raises(DataError, match=error):
            train(config, resume=two_checkpoints)
    cursor = two_checkpoints / "checkpoints" / "step-000008" / "data_cursor.json"
    changed = json.loads(cursor.read_text()) | {"tokens": "other"}
    cursor.write_text(json.dumps(changed))
    # A cursor changed by hand no longer has its sha256, so the older checkpoint is taken.
    assert checkpoint.newest_valid(two_checkpoints / "checkpoints").name == "step-000004"


def test_a_rate_given_on_resume_is_used_and_the_end_can_be_moved(two_checkpoints: Path) -> None:
    config = helpers.config(
        two_checkpoints, *EPOCHS, "training.max_steps=12", "optim.learning_rate=0.001"
    )
    run = train(config, resume=two_checkpoints)
    assert run.step == 12
    rates = [record["learning_rate"] for record in run.metrics if "learning_rate" in record]
    assert rates[-1] == pytest.approx(0.0001)


def test_only_the_newest_checkpoint_of_a_run_is_resumed(two_checkpoints: Path) -> None:
    old = two_checkpoints / "checkpoints" / "step-000004"
    with pytest.raises(DataError, match="not the newest usable checkpoint"):
        train(helpers.config(two_checkpoints, *EPOCHS), resume=old)


def test_auto_takes_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 5)
    config = helpers.config(tmp_path)
    with pytest.raises(Interrupted):
        train(config)
    assert train(config, resume="auto").step == 12
    with pytest.raises(DataError, match="no run of slm_nano"):
        train(helpers.config(tmp_path / "empty"), resume="auto")
    with pytest.raises(DataError, match="is not a run"):
        train(config, resume=tmp_path)


def test_a_second_process_is_kept_out(two_checkpoints: Path) -> None:
    code = (
        "import sys, time\nfrom thimble.artifacts import locked\n"
        f"with locked({str(two_checkpoints)!r}, 'run'):\n    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        before = (two_checkpoints / "metrics.jsonl").read_bytes()
        with pytest.raises(EnvironmentProblem, match=f"Process {other.pid} is writing"):
            train(helpers.config(two_checkpoints, *EPOCHS), resume=two_checkpoints)
        assert (two_checkpoints / "metrics.jsonl").read_bytes() == before
    finally:
        other.kill()
        other.wait()


def test_finding_the_place_reads_no_data(two_checkpoints: Path) -> None:
    """The cursor is a number, so step 10^6 is found as fast as step 8."""
    cursor = json.loads(
        (two_checkpoints / "checkpoints" / "step-000008" / "data_cursor.json").read_text()
    )
    assert cursor["windows_seen"] == 8 * 40
    windows = helpers.trainer(helpers.config(two_checkpoints, *EPOCHS)).task.windows.windows
    reads = []
    windows.tokens = _Counting(windows.tokens, reads)  # type: ignore[assignment]
    windows.batch(40 * 10**6, 4)
    assert reads == [(4, helpers.WINDOW + 1)]


class _Counting:
    def __init__(self, inner, reads):  # type: ignore[no-untyped-def]
        self.inner, self.reads = inner, reads

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.reads.append(index.shape)
        return self.inner[index]


def test_a_finished_run_says_that_nothing_is_left(
    uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (uninterrupted / "checkpoints" / "step-000012" / "optimizer.pt").read_bytes()
    with caplog.at_level("INFO", "thimble"):
        run = train(load_run(uninterrupted), resume=uninterrupted)
    assert run.status == "finished"
    assert "All 12 steps are done" in caplog.text
    assert (uninterrupted / "checkpoints" / "step-000012" / "optimizer.pt").read_bytes() == before
