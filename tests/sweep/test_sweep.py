"""A sweep is its runs, each as if trained alone; what fails is recorded and ends nothing else."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import helpers_training as helpers
from tests.helpers_cli import Command
from thimble import api
from thimble.config.load import load_run
from thimble.errors import ConfigError, DataError, EnvironmentProblem, Interrupted
from thimble.sweep import Sweep, ledger
from thimble.sweep.words import Words
from thimble.training import train
from thimble.training.loop import Trainer
from thimble.training.run import RunFolder

RATES = "optim.learning_rate=1e-2,1e-1"
GUARDS = "guards.max_grad_norm=1000,1e-9"


def sweep(folder: Path, *words: str) -> Sweep:
    return api.sweep(recipe(folder), *words)


def recipe(folder: Path) -> Path:
    """A complete configuration of a tiny run, which can stand in the place of a recipe."""
    path = folder / "config.yaml"
    if not path.exists():
        from thimble.config.load import save

        save(helpers.config(folder / "runs"), path)
    return path


def by_overrides(result: Sweep, **values: Any) -> dict[str, Any]:
    (run,) = [run for run in result.runs if values.items() <= run["overrides"].items()]
    return run


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    """Two rates, two seeds, and of each one run that a guard stops."""
    folder = tmp_path_factory.mktemp("swept")
    before = set(Path.cwd().iterdir())
    result = sweep(folder, RATES, GUARDS, "seed=1,2")
    assert set(Path.cwd().iterdir()) == before  # Hydra left nothing where the command was called
    return result, folder


def test_the_best_comes_first_and_stopped_runs_are_recorded(swept: tuple[Sweep, Path]) -> None:
    result, _ = swept
    assert len(result.runs) == 8
    assert [run["status"] for run in result.runs] == ["finished"] * 4 + ["stopped"] * 4
    bits = [run["val_bits_per_byte"] for run in result.runs[:4]]
    assert bits == sorted(bits)
    assert result.best == result.runs[0]
    for run in result.runs:
        if run["overrides"]["guards.max_grad_norm"] == 1e-9:
            assert run["status"] == "stopped"
            assert "the gradient norm" in run["reason"]
            assert run["exit_status"] == 4
        else:
            assert (run["steps"], run["best_step"] % 4) == (12, 0)
            assert run["seconds"] > 0


def test_a_run_of_a_sweep_is_the_run_that_train_makes(
    swept: tuple[Sweep, Path], tmp_path: Path
) -> None:
    result, _ = swept
    mine = by_overrides(
        result, **{"optim.learning_rate": 0.1, "guards.max_grad_norm": 1000, "seed": 2}
    )
    alone = train(helpers.config(tmp_path, "optim.learning_rate=0.1", "seed=2"))
    assert helpers.timeless(Path(mine["run"])) == helpers.timeless(alone.path)
    assert RunFolder(mine["run"]).pointed("best")
    best = min(r["val_bits_per_byte"] for r in alone.metrics if "val_loss" in r)
    assert mine["val_bits_per_byte"] == best
    assert load_run(mine["run"]).seed == 2
    assert api.report(mine["run"]).path.is_file()


def test_means_and_deviations_over_seeds(swept: tuple[Sweep, Path]) -> None:
    result, _ = swept
    assert [row["runs"] for row in result.seeds] == [2, 2]  # where no run finished, nothing is said
    for row in result.seeds:
        values = [
            run["val_bits_per_byte"]
            for run in result.runs
            if row["overrides"].items() <= run["overrides"].items()
        ]
        assert len(values) == 2
        assert row["mean"] == pytest.approx(sum(values) / 2)
        assert row["sd"] == pytest.approx(statistics.stdev(values))
    assert result.seeds[0]["mean"] < result.seeds[1]["mean"]


def test_the_folder_holds_the_account_and_the_plots(swept: tuple[Sweep, Path]) -> None:
    result, folder = swept
    assert result.folder.parent == folder / "runs" / "sweeps" / "slm_nano"
    account = json.loads((result.folder / "sweep.json").read_text())
    assert account["swept"]["optim.learning_rate"] == ["0.01", "0.1"]
    assert {run["number"] for run in account["runs"]} == set(range(1, 9))
    names = {path.name for path in result.folder.iterdir() if not path.name.startswith(".")}
    assert names == {"sweep.json", "sweep.png", "curves.png", "multirun.yaml"}
    for plot in result.plots:
        with Image.open(plot) as image:
            assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 20  # not an empty frame
    runs = {path.name for path in (folder / "runs" / "slm_nano").iterdir()}
    assert runs == {Path(run["run"]).name for run in result.runs}


def test_what_a_person_and_a_program_see(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = Command(capfd)
    words = ["sweep", str(recipe(tmp_path)), "guards.max_grad_norm=1e-9,1000,2000"]
    answer = command(*words)
    assert answer.status == 0, answer.err
    assert "run 2 of 3: guards.max_grad_norm=1000" in answer.err
    assert "run 1 of 3 stopped: Stopped at step" in answer.err
    assert "Launching" not in answer.out + answer.err  # Hydra's own log
    rows = [line.split() for line in answer.out.splitlines()]
    assert [row[0] for row in rows if len(row) > 2 and row[0] in "123"][:3] == ["2", "3", "1"]
    best = next(line for line in answer.out.splitlines() if line.startswith("best: "))
    assert "guards.max_grad_norm=1000, " in best
    assert "  thimble report " in answer.out

    answer = command(*words, "--json")
    said = json.loads(answer.out)
    assert said["best"]["overrides"] == {"guards.max_grad_norm": 1000}
    assert [run["status"] for run in said["runs"]] == ["finished", "finished", "stopped"]


def test_when_nothing_finished_the_status_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Command(capfd)
    words = ["sweep", str(recipe(tmp_path)), "guards.max_grad_norm=1e-9,1e-8", "-q"]
    answer = command(*words)
    assert answer.status == 4
    assert "None of the 2 runs finished" in answer.err

    def broken(self: Trainer) -> None:
        if self.config.guards.max_grad_norm == 1e-8:
            raise OSError(28, "No space left on device")
        inner(self)

    inner = Trainer.step
    monkeypatch.setattr(Trainer, "step", broken)
    answer = command(*words)
    assert answer.status == 6
    assert "No space left on device" in answer.err


# --------------------------------------------------------------------------- interrupted, resumed


def interrupt(monkeypatch: pytest.MonkeyPatch, rate: float, at_step: int) -> None:
    """Deliver a real SIGTERM to this process at a step of the run with this learning rate."""
    inner = Trainer.step

    def step(self: Trainer) -> None:
        inner(self)
        if self.config.optim.learning_rate == rate and self.state.step == at_step:
            monkeypatch.setattr(Trainer, "step", inner)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "step", step)


def test_an_interrupted_sweep_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rates = "optim.learning_rate=1e-2,1e-1,1e-3"
    whole = sweep(tmp_path, rates)
    command = Command(capfd)
    interrupt(monkeypatch, 0.1, 6)
    answer = command("sweep", str(recipe(tmp_path)), rates)
    assert answer.status == 75
    (line,) = [line for line in answer.err.splitlines() if line.startswith("  thimble sweep")]
    folder = Path(line.split()[-1])
    account = ledger.read(folder)
    assert [run["status"] for run in account["runs"]] == ["finished", "interrupted", "waiting"]
    assert account["runs"][1]["steps"] == 6
    first = Path(account["runs"][0]["run"])
    changed = first.joinpath("metrics.jsonl").stat().st_mtime_ns

    answer = command(*line.split()[1:], "--json")
    assert answer.status == 0, answer.err
    said = json.loads(answer.out)
    assert first.joinpath("metrics.jsonl").stat().st_mtime_ns == changed
    assert [run["number"] for run in said["runs"]] == [run["number"] for run in whole.runs]
    for mine, theirs in zip(said["runs"], whole.runs, strict=True):
        assert helpers.timeless(Path(mine["run"])) == helpers.timeless(Path(theirs["run"]))
        assert mine["val_bits_per_byte"] == theirs["val_bits_per_byte"]


def test_a_killed_run_is_found_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 0.1, 6)
    with pytest.raises(Interrupted):
        sweep(tmp_path, RATES)
    (folder,) = (tmp_path / "runs/sweeps/slm_nano").iterdir()
    with ledger.changing(folder) as account:  # as a kill would have left it
        run = account["runs"][1]
        path = run.pop("run")
        run["status"] = "running"
    result = api.sweep(resume=folder)
    assert by_overrides(result, **{"optim.learning_rate": 0.1})["run"] == path
    events = [r for r in RunFolder(path).records() if r.get("event") == "resumed"]
    assert events[0]["step"] == 6


def test_only_a_sweep_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a sweep"):
        api.sweep(resume=tmp_path)
    for words, options in ((["slm_nano"], {"resume": tmp_path}), ([], {})):
        with pytest.raises(ConfigError, match="Give a recipe"):
            api.sweep(*words, **options)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- refused before a run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=2"], r"nothing to sweep.*\n.*\n.*\n  thimble train .* seed=2"),
        (["optim.lerning_rate=1e-3,1e-2"], r"\n  optim.learning_rate=1e-3,1e-2\n"),
        (["optim.learning_rate=1e-3,3"], r"learning_rate=3 is not possible.*\n.*\n\(in the run"),
        (["seed=1,2", "optim.name=adamw,moon"], r"name=muon\n\(in the run seed=1 optim.name=moon"),
        (["seed=1,2", "optim.learning_rate=3"], "learning_rate=3 is not possible"),
        (["optim.learning_rate=interval(1e-3,1e-2)"], "hydra/sweeper=optuna"),
        (["model=slm_nano,slm_tiny"], "is a complete configuration"),
        (["seed=1,2", "hydra/launcher=submitt"], "There is no hydra/launcher=submitt"),
        (["seed=1,2", "hydra.sweeper.no_such=1"], "no_such"),
        (["seed=glob(*)"], "cannot be swept"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(
    tmp_path: Path, words: Sequence[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep(tmp_path, *words)
    assert not (tmp_path / "runs").exists()


def test_missing_tokens_and_missing_plugins_are_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="/nowhere"):
        sweep(tmp_path, "seed=1,2", "data.path=/nowhere")
    with pytest.raises(EnvironmentProblem, match="pip install hydra-ray-launcher"):
        sweep(tmp_path, "seed=1,2", "hydra/launcher=ray")
    assert not (tmp_path / "runs").exists()


def test_a_misspelt_key_is_answered_with_the_line_as_it_was_meant(
    capfd: pytest.CaptureFixture[str],
) -> None:
    answer = Command(capfd)("sweep", "slm_nano", "--optim.lr", "1e-3,1e-2", "seed=1")
    assert answer.status == 2
    assert "  thimble sweep slm_nano optim.learning_rate=1e-3,1e-2 seed=1\n" in answer.err


# --------------------------------------------------------------------------- the words


def test_words_are_sorted_and_later_ones_win() -> None:
    words = Words.sorted_from(
        [
            *("seed=1,2", "optim.learning_rate=choice(1e-3,1e-2)", "training.max_steps=range(2,5)"),
            *("--optim.betas", "[0.9,0.95],[0.8,0.9]", "seed=7", "data.path=/a b/c", "optim.eps=1"),
            *("optim.eps=1e-8,1e-9", "hydra.launcher.n_jobs=2", "model=slm_nano,slm_tiny"),
        ],
        {"optim": {"learning_rate": 0.5}},
    )
    assert words.fixed == {"seed": 7, "data.path": "/a b/c", "optim.learning_rate": 0.5}
    assert words.hydra == ["hydra.launcher.n_jobs=2"]
    assert {key: len(values) for key, values in words.values().items()} == {
        "training.max_steps": 3,
        "optim.betas": 2,
        "optim.eps": 2,
        "model": 2,
    }
    assert len(words.combinations()) == 3 * 2 * 2 * 2
    assert words.combinations()[0] == {
        "training.max_steps": 2,
        "optim.betas": [0.9, 0.95],
        "optim.eps": 1e-8,
        "model": "slm_nano",
    }


def test_of_drawn_values_each_is_looked_at_once() -> None:
    words = Words.sorted_from(
        ["optim.learning_rate=tag(log,interval(1e-4,1e-2))", "optim.name=adamw,muon"], {}
    )
    rates = [probe["optim.learning_rate"] for probe in words.probes()]
    assert set(rates) == {1e-4, 1e-2}
    assert {probe["optim.name"] for probe in words.probes()} == {"adamw", "muon"}
    assert len(words.probes()) == 4


def test_groups_are_swept_with_what_the_recipe_derives_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def instead(config: Any, resume: Any) -> Any:
        seen.append((config.model.hidden_size, config.training.sequence_length))
        raise ConfigError("not really")

    monkeypatch.setattr("thimble.training.train", instead)
    with pytest.raises(Exception, match="not really"):
        api.sweep(
            "slm_nano", "model=slm_nano,slm_tiny", f"data.path={helpers.token_directory()}",
            f"output_dir={tmp_path}", "device=cpu",
        )  # fmt: skip
    assert len({size for size, _ in seen}) == 2
    assert seen[1][1] == 1024


# --------------------------------------------------------------------------- Hydra's plugins


def test_optuna_draws_and_learns_of_failed_runs(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    result = sweep(
        tmp_path,
        "optim.learning_rate=tag(log,interval(1e-3,1e-1))",
        "guards.max_grad_norm=choice(1e-9,1000)",
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=1",
    )  # fmt: skip
    assert len(result.runs) == 4
    statuses = {run["overrides"]["guards.max_grad_norm"]: run["status"] for run in result.runs}
    assert statuses == {1e-9: "stopped", 1000: "finished"}
    found = (result.folder / "optimization_results.yaml").read_text()
    assert result.best is not None
    assert str(result.best["val_bits_per_byte"]) in found
    assert "optim.learning_rate: " in found
    with pytest.raises(ConfigError, match="cannot be resumed"):
        api.sweep(resume=result.folder)


def test_submitit_runs_in_other_processes(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    here = sweep(tmp_path, RATES)
    there = sweep(tmp_path, RATES, "hydra/launcher=submitit_local")
    bits = [[run["val_bits_per_byte"] for run in result.runs] for result in (here, there)]
    assert bits[0] == pytest.approx(bits[1])
    assert all(math.isfinite(value) for value in bits[0])
