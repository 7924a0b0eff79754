"""Several processes are one process, until one of them is lost; then all of them say so and end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests import helpers_recursion
from tests import helpers_training as helpers
from tests.training.several_processes import CASES, SHAPE, recursive_config
from tests.training.test_resume import interrupt_after
from thimble.conversations.dataset import Conversations
from thimble.errors import ConfigError, EnvironmentProblem, GuardStop, Interrupted
from thimble.training import checkpoint, distributed, train
from thimble.training.checkpoint import unpickle_safely
from thimble.training.distributed import Processes, ProcessFailed
from thimble.training.run import RunFolder
from thimble.training.signals import StopRequest

ROOT = Path(__file__).parents[2]


def torchrun(*words: str) -> subprocess.Popen[str]:
    helpers.token_directory()  # built before two processes ask for it
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def several_processes(output: Path, *words: str) -> subprocess.Popen[str]:
    ports = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return torchrun(*ports, "-m", "tests.training.several_processes", str(output), *words)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that two processes are asked to do, and the same with one."""

    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            train(helpers.config(folder / "legs", *SHAPE))
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            train(recursive_config("conversations", folder / "recursive legs"))
    # What the second one of these begins with, the processes need as well.
    for kind in ("puzzles", "frozen"):
        train(recursive_config(kind, folder / kind / "one"))
    child = several_processes(folder, "all")
    for name, overrides in CASES.items():
        train(helpers.config(folder / name / "one", *SHAPE, *overrides))
    train(recursive_config("conversations", folder / "conversations" / "one"))
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    return folder


def the_run(folder: Path) -> Path:
    (run,) = (folder / "slm_nano").iterdir()
    return run


def results(output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (json.loads((output / f"{rank}.json").read_text()) for rank in (0, 1))
    return first, second


def assert_same_training(run: Path, one: Path) -> None:
    ours, theirs = helpers.timeless(run), helpers.timeless(one)
    assert len(ours) == len(theirs) == 7  # 4 of training, 3 of evaluation
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    mine, other = (path / "checkpoints" / "step-000012" for path in (run, one))
    weights, others = (load_file(path / "model.safetensors") for path in (mine, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-5)
    states = [unpickle_safely(path / "optimizer.pt") for path in (mine, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, values in states[1]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(states[0]["state"][index][name], value, rtol=1e-3, atol=1e-5)
    cursors = [json.loads((path / "data_cursor.json").read_text()) for path in (mine, other)]
    assert cursors[0] == cursors[1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", ["muon", "adamw", "recompute, untied"])
def test_two_processes_are_one(case: str, kind: str, output: Path) -> None:
    assert_same_training(the_run(output / case / kind), the_run(output / case / "one"))


def test_a_run_goes_on_with_another_number_of_processes(output: Path) -> None:
    """One process to step 3, two with DDP to 7, two with FSDP to 9, one to the end."""

    for result in results(output):
        assert [result[kind]["error"] for kind in ("ddp", "fsdp")] == ["Interrupted"] * 2
        assert "saved at step 7" in result["ddp"]["message"]
        assert "saved at step 9" in result["fsdp"]["message"]
    run = the_run(output / "legs")
    assert train(helpers.config(output / "legs", *SHAPE), resume=run).step == 12
    assert_same_training(run, the_run(output / "muon" / "one"))


def recursive_run(folder: Path) -> Path:
    (run,) = folder.glob("*/*")
    return run


def assert_same_recursion(run: Path, one: Path) -> None:
    ours, theirs = helpers.timeless(run), helpers.timeless(one)
    assert len(ours) == len(theirs)
    assert any("val_by_step" in record for record in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"val_by_step"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
        steps = (record.get("val_by_step", []) for record in (a, b))
        for mine, other in zip(*steps, strict=True):
            assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
    mine, other = (RunFolder(path).pointed("latest") for path in (run, one))
    assert mine is not None
    assert other is not None
    assert mine.name == other.name
    for name in ("model", "trained"):  # the averages, and what goes on
        weights, others = (checkpoint.tensors(path, name) for path in (mine, other))
        assert weights.keys() == others.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(weight, others[key], rtol=1e-4, atol=1e-5, msg=key)
    cursors = [json.loads((path / "data_cursor.json").read_text()) for path in (mine, other)]
    assert cursors[0] == cursors[1]


@pytest.mark.parametrize("kind", ["conversations", "puzzles", "frozen"])
def test_recursion_in_two_processes_is_recursion_in_one(kind: str, output: Path) -> None:
    one = recursive_run(output / kind / "one")
    assert_same_recursion(recursive_run(output / kind / "two"), one)
    if kind != "conversations":
        latest = RunFolder(one).pointed("latest")
        assert latest is not None
        assert load_file(latest / "model.safetensors")["puzzle_embedding.weight"].any()


def test_an_epoch_shows_every_example_to_one_of_the_processes(output: Path) -> None:
    first, second = (result["seen"] for result in results(output))
    assert len(first) > 30
    assert len(second) > 30
    data = Conversations(helpers_recursion.conversation_directory())
    assert sorted(first + second) == sorted(data.split("train").tolist())


def test_recursion_goes_on_with_another_number_of_processes(output: Path) -> None:
    """One process to step 5, two to step 10, one to the end: rows in the middle of examples."""
    for result in results(output):
        assert result["recursive leg"]["error"] == "Interrupted"
        assert "saved at step 10" in result["recursive leg"]["message"]
    run = recursive_run(output / "recursive legs")
    train(recursive_config("conversations", output / "recursive legs"), resume=run)
    assert_same_recursion(run, recursive_run(output / "conversations" / "one"))


def test_a_guard_in_one_process_stops_all(output: Path) -> None:
    first, second = (result["nan"] for result in results(output))
    assert first == second
    assert first["error"] == "GuardStop"
    assert "Stopped at step 5: the loss is nan" in first["message"]
    (event,) = [r for r in RunFolder(the_run(output / "nan")).records() if r.get("event")]
    assert (event["event"], event["kind"], event["step"]) == ("guard", "nan", 5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_memory_that_one_process_lacks_is_mended_by_all(kind: str, output: Path) -> None:
    for result in results(output):
        assert result[f"memory {kind}"] == {"error": None}
    run = the_run(output / "memory" / kind)
    first, second = json.loads((run / "attempts.json").read_text())
    assert (first["kind"], first["step"], second["outcome"]) == ("out_of_memory", 5, "finished")
    assert first["change"]["training.micro_batch_size"] == {"from": 2, "to": 1}
    events = [r["event"] for r in RunFolder(run).records() if "event" in r]
    assert events == ["guard", "resumed", "finished"]


def test_an_error_in_one_process_is_named_by_the_others(output: Path) -> None:
    first, second = (result["data"] for result in results(output))
    assert second == {"error": "DataError", "message": "Shard 7 is damaged.", "status": 5}
    assert first["error"] == "ProcessFailed"
    assert first["message"] == "Process 1 of 2 failed: Shard 7 is damaged."
    assert first["status"] == 5
    run = the_run(output / "data")
    assert "Shard 7 is damaged" in (run / "error.txt").read_text()
    (event,) = [r for r in RunFolder(run).records() if r.get("event")]
    assert (event["event"], event["rank"]) == ("failed", 1)


def test_torchrun_reports_the_error_once_and_its_cause(tmp_path: Path) -> None:
    words = ["train", str(long_run(tmp_path))]
    child = several_processes(tmp_path, "command", *words)
    started = time.monotonic()
    _, err = child.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert child.returncode != 0
    assert err.count("error: Process 1 of 2 failed: Shard 7 is damaged.") == 1
    cause = err.split("Root Cause")[1]
    assert "rank      : 1 " in cause
    assert "Shard 7 is damaged." in cause


def long_run(tmp_path: Path) -> Path:
    """The config.yaml of a run that does not end by itself."""
    from thimble.config import load as configuration

    never = [f"training.{key}=1000000" for key in ("eval_every", "save_every", "max_steps")]
    config = helpers.config(tmp_path / "out", *never, "training.max_epochs=null")
    configuration.save(config, tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def when(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.1)


def test_a_killed_process_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    child = torchrun("--standalone", "-m", "thimble", "train", str(long_run(tmp_path)))
    when(lambda: any(tmp_path.glob("out/slm_nano/*/metrics.jsonl")), child)
    (victim,) = [
        process
        for process in psutil.Process(child.pid).children()
        if process.environ().get("RANK") == "1"
    ]
    started = time.monotonic()
    victim.kill()
    _, err = child.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert child.returncode != 0
    said = f"Process 1 of 2 (pid {victim.pid}) was killed"
    assert err.count(f"error: {said}") == 1
    assert "SIGKILL" in err.split("Root Cause")[1]
    run = the_run(tmp_path / "out")
    assert said in (run / "error.txt").read_text()
    (event,) = [r for r in RunFolder(run).records() if r.get("event")]
    assert (event["event"], event["rank"]) == ("failed", 1)
    assert not list(run.glob("checkpoints/*"))


def test_a_process_that_hangs_does_not_outlive_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The main thread waits for a device for ever; the watch ends the process."""
    monkeypatch.setattr(distributed, "GRACE", 0.2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    processes = Processes()
    processes.store = dist.HashStore()
    exits: list[int] = []
    said: list[ProcessFailed] = []
    processes.lost = said.append

    def exit_with(status: int) -> None:
        exits.append(status)
        processes.ended.set()

    monkeypatch.setattr(os, "_exit", exit_with)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        processes.peers[1] = psutil.Process(other.pid)
        assert processes.failure() is None
        other.kill()  # and nobody has waited for it yet
        processes.watch(processes.store)
    assert exits == [6]
    assert said[0].rank == 1
    assert "Process 1 of 2" in capsys.readouterr().err


def test_one_that_has_finished_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes = Processes()
    processes.store = dist.HashStore()
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        processes.peers[1] = psutil.Process(other.pid)
    assert processes.failure() is not None
    processes.store.set("left/1", "1")
    assert processes.failure() is None


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("rank", "host", "words"),
    [
        (1, "127.0.0.1", "has not answered for 1 s.*refused"),
        (1, "no-such-host.invalid", "has not answered for 1 s"),
        (0, "127.0.0.1", "did not find each other.*1/2 clients joined"),
        (1, "", "Start several processes with torchrun"),
    ],
)
def test_a_rendezvous_that_does_not_come_about(
    rank: int,
    host: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = helpers.config(tmp_path / "out")
    port = closed_port()
    settings = {"WORLD_SIZE": 2, "RANK": rank, "MASTER_ADDR": host, "MASTER_PORT": port}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "RENDEZVOUS", distributed.timedelta(seconds=1))
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    with pytest.raises(EnvironmentProblem, match=f"(?s){words}") as caught:
        train(config)
    assert time.monotonic() - started < 20
    assert f"{host}:{port}" in str(caught.value)
    assert "Exception raised from" not in capfd.readouterr().err  # torch's stack traces
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_that_torchrun_repeats_does_not_break(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    alone, several = StopRequest(several=False), StopRequest(several=True)
    assert not alone
    for request in (alone, several):
        request.ask(signal.SIGINT, None)
        assert request
    now += 0.5
    several.ask(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        alone.ask(signal.SIGINT, None)
    now += 5
    several.ask(signal.SIGTERM, None)  # asks for the same again
    with pytest.raises(KeyboardInterrupt):
        several.ask(signal.SIGINT, None)


def test_a_step_that_cannot_be_shared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="split over 3 processes"):
        helpers.trainer(helpers.config(tmp_path))


def test_a_guard_stop_carries_its_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every process comes to the same remedy, without reading what the first one wrote."""
    config = helpers.config(tmp_path, "guards.max_grad_norm=1e-9")
    with pytest.raises(GuardStop) as stopped:
        train(config)
    (event,) = [r for r in RunFolder(stopped.value.run).records() if "event" in r]
    assert stopped.value.event == event
