"""From the words of a sweep to its runs: all is checked, then Hydra's multirun starts the jobs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from thimble import artifacts
from thimble.config.describe import nearest_word
from thimble.config.load import load
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import ConfigError, EnvironmentProblem, Interrupted
from thimble.sweep import charts, ledger, teaching
from thimble.sweep.job import Job, say
from thimble.sweep.result import Sweep, SweepFailed
from thimble.sweep.words import Words, text

CONFIG_NAME = "thimble_sweep"
# What to install for a choice of Hydra's, by the name that stands on the command line.
PLUGINS = {
    "submitit_local": "'thimble-lm[sweep]'",
    "submitit_slurm": "'thimble-lm[sweep]'",
    "joblib": "'thimble-lm[sweep]'",
    "optuna": "'thimble-lm[sweep]'",
    "ray": "hydra-ray-launcher",
}


def sweep(
    recipe: str | os.PathLike[str] | None,
    overrides: Sequence[str] = (),
    nested: Mapping[str, Any] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Sweep:
    """Train a recipe once for each combination of the values given; see ``thimble.api.sweep``."""
    if resume is not None:
        account = ledger.read(Path(resume))
        recipe, overrides, nested = account["recipe"], account["words"], account["fixed"]
    assert recipe is not None
    from thimble.training.data import teachers_now, with_teacher

    words = Words.sorted_from(overrides, nested or {})
    if not words.swept:
        line = " ".join(["thimble train", str(recipe), *overrides])
        raise ConfigError(
            "No key has several values, so there is nothing to sweep. For example:\n"
            f"  thimble sweep {recipe} optim.learning_rate=1e-3,3e-3\nA single run:\n  {line}"
        )
    grid = words.choice("sweeper") == "basic"
    if resume is not None and not grid:
        raise ConfigError(
            f"{resume} was drawn by {words.choice('sweeper')} and cannot be resumed here. A new "
            "sweep goes on with a study that it shares: hydra.sweeper.storage, "
            "hydra.sweeper.study_name."
        )
    launcher = words.choice("launcher")
    with own_hydra() as hydra:
        check_plugins(hydra, words)
        configs = check_values(str(recipe), words, grid)
        teachers = account.get("teachers", {}) if resume is not None else teachers_now(configs)
        configs = [with_teacher(config, teachers) for config in configs]
        folder = Path(resume) if resume is not None else name_folder(configs[0], overrides)
        register(words)
        arguments = hydra_arguments(words, folder)
        trials = number_of_trials(hydra, arguments)
        total = len(configs) if grid else trials
        if resume is None:
            combinations = words.combinations() if grid else []
            account = {
                "kind": "sweep",
                "recipe": str(recipe),
                "words": list(overrides),
                "fixed": dict(nested or {}),
                "swept": words.values(),
                "teachers": teachers,
                "versions": artifacts.versions("torch", "hydra-core"),
                "runs": [
                    {"number": number, "overrides": combination, "status": "waiting"}
                    for number, combination in enumerate(combinations, 1)
                ],
            }
            artifacts.write_json(folder / ledger.LEDGER, account)
        going_on = f"Go on with:\n  thimble sweep --resume {folder}" if grid else ""
        with artifacts.locked(folder, "sweep"):
            log.info("%s: %s runs, %s", recipe, total or "any number of", folder)
            try:
                caches = teaching.prepare(configs, here=launcher == "basic")
            except KeyboardInterrupt:
                raise Interrupted(
                    f"Interrupted while the teacher was asked; what it said is kept. {going_on}"
                ) from None
            job = Job(folder.absolute(), str(recipe), words.fixed, total, caches, teachers)
            stopped = run_jobs(hydra, job, arguments, launcher)
    result = Sweep.of(folder, charts.draw(folder))
    if stopped:
        finished = sum(run["status"] == "finished" for run in result.runs)
        raise Interrupted(
            f"Interrupted; {finished} of {total or 'the'} runs are finished, and what they gave "
            f"is in {folder}. {going_on}".rstrip()
        )
    if result.best is None:
        raise SweepFailed(result)
    return result


@contextlib.contextmanager
def own_hydra() -> Iterator[Any]:
    """Hydra, initialized for us; that of a program which uses Hydra itself is put aside and back.

    Multirun is a method of the object that Hydra's own compose API uses; ``hydra.main`` would read
    the words of the process, and end the process on an error.
    """
    instance = GlobalHydra.instance()
    theirs, instance.hydra = instance.hydra, None
    try:
        with initialize_config_module("thimble.sweep", "thimble", version_base="1.3"):
            yield GlobalHydra.instance().hydra
    finally:
        GlobalHydra.instance().hydra = theirs


def check_plugins(hydra: Any, words: Words) -> None:
    """Refuse a launcher or sweeper that is not there, with the package that has it."""
    for group in ("launcher", "sweeper"):
        choice = words.choice(group)
        there = hydra.config_loader.get_group_options(f"hydra/{group}")
        if choice == "optuna" and choice in there:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)  # its notes would be among ours
        if choice in there:
            continue
        if choice in PLUGINS:
            raise EnvironmentProblem(
                f"hydra/{group}={choice} needs a package that is not installed. Install it with:\n"
                f"  pip install {PLUGINS[choice]}"
            )
        close = nearest_word(choice, there)
        hint = f" Did you mean:\n  hydra/{group}={close}" if close else ""
        raise ConfigError(
            f"There is no hydra/{group}={choice}.{hint}\nInstalled: {', '.join(there)}."
        )


def check_values(recipe: str, words: Words, grid: bool) -> list[Config]:
    """Every combination, checked as ``thimble train`` checks it, before the first run begins.

    Of a sweeper that draws its values each value is checked once, and the ends of intervals.
    """
    from thimble.training.devices import resolve_device
    from thimble.training.plan import plan

    intervals = [key for key, sweep in words.swept.items() if sweep.is_interval_sweep()]
    if grid and intervals:
        raise ConfigError(
            f"{words.swept[intervals[0]].input_line} needs a sweeper that draws values:\n"
            "  hydra/sweeper=optuna"
        )
    configs, warnings = [], dict[str, None]()
    for combination in words.combinations() if grid else words.probes():
        try:
            config = load(recipe, nested={**words.fixed, **combination})
        except ConfigError as error:
            error.args = (f"{error}\n(in the run {text(combination)})",)
            raise
        if config.training.eval_every == 0:
            raise ConfigError(
                "A sweep compares its runs by their evaluations, and training.eval_every=0 has "
                "none. Leave it out, or for one at the end use:\n"
                f"  training.eval_every={config.training.max_steps}"
            )
        configs.append(config)
        warnings |= dict.fromkeys(plan(config).warnings)
        if words.choice("launcher") == "basic":  # elsewhere there may be another device
            resolve_device(config.device)
    check_units(configs)
    for warning in warnings:
        log.warning("%s", warning)
    return configs


def check_units(configs: Sequence[Config]) -> None:
    """Refuse runs of which none could be called the best, since their data differ in the unit."""
    from thimble.training.data import held_out_unit

    units = {held_out_unit(config): config.data.path for config in configs}
    if len(units) > 1:
        raise ConfigError(
            "These runs cannot be ranked together: what is held out is measured in\n"
            + "\n".join(f"  {unit} for data.path={path}" for unit, path in units.items())
            + "\nSweep each by itself."
        )


def name_folder(config: Config, words: Sequence[str]) -> Path:
    slug = artifacts.fingerprint([config.recipe, time.time_ns(), *words])[:6]
    stamp = time.strftime(ledger.STAMP)
    return Path(config.output_dir) / "sweeps" / config.recipe / f"{stamp}-{slug}"


def hydra_arguments(words: Words, folder: Path) -> list[str]:
    """What Hydra is told: to write nothing of its own elsewhere, its words, and what is swept."""
    path = str(folder.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return [
        "hydra.mode=MULTIRUN",
        "hydra/hydra_logging=none",
        "hydra/job_logging=none",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir='{path}'",
        "hydra.sweep.subdir=.",
        *words.hydra,
        *(str(override.input_line) for override in words.swept.values()),
    ]


def register(words: Words) -> None:
    """Give Hydra a configuration that has the swept keys, so that it takes values for them."""
    config = OmegaConf.create({})
    for key in words.swept:
        OmegaConf.update(config, key, None, force_add=True)
    ConfigStore.instance().store(CONFIG_NAME, config)


def number_of_trials(hydra: Any, arguments: Sequence[str]) -> int | None:
    """How many runs a sweeper that draws values will start; None where it does not say.

    Raises ConfigError for words of Hydra that it does not take.
    """
    try:
        config = hydra.compose_config(CONFIG_NAME, list(arguments), RunMode.MULTIRUN)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"Hydra does not take this: {error}") from error
    trials = OmegaConf.select(config, "hydra.sweeper.n_trials")
    return trials if isinstance(trials, int) else None


def run_jobs(hydra: Any, job: Job, arguments: Sequence[str], launcher: str) -> bool:
    """Let Hydra call the job for every combination; True when that was interrupted."""
    here = launcher == "basic"
    with contextlib.nullcontext() if here else following(job.folder, job.total):
        try:
            hydra.multirun(CONFIG_NAME, job, list(arguments), with_log_configuration=False)
        except KeyboardInterrupt:
            return True
        except Exception as error:
            lose(job.folder, error)
    return False


def lose(folder: Path, error: Exception) -> None:
    """Enter the runs that Hydra's plugins gave up: their processes could not do it themselves."""
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    with ledger.changing(folder) as account:
        if all(run["status"] == "waiting" for run in account["runs"]):
            raise EnvironmentProblem(f"Hydra could not start a run: {what}") from error
        for run in account["runs"]:
            if run["status"] == "running":
                run.update(status="failed", exit_status=EnvironmentProblem.status)
                run["reason"] = f"its launcher gave it up: {what}"
    log.warning("Hydra ended the sweep: %s", what)


@contextlib.contextmanager
def following(folder: Path, total: int | None) -> Iterator[None]:
    """Say when the runs in other processes begin and end."""
    over = threading.Event()

    def follow() -> None:
        told = {run["number"]: run["status"] for run in ledger.read(folder)["runs"]}
        last = False
        while not last:
            last = over.wait(timeout=1.0)
            for run in ledger.read(folder)["runs"]:
                if told.get(run["number"], "waiting") != run["status"]:
                    told[run["number"]] = run["status"]
                    say(run, total)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
