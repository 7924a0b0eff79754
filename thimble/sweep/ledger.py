"""``sweep.json``: what is swept, and what became of every run.

Each job, in whatever process it runs, enters its own end here: read, changed and renamed into place
under a lock of the kernel's, so that the file is whole at any moment and no entry is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from thimble import artifacts
from thimble.config.load import CONFIG_FILE, load_run
from thimble.config.schema import Config
from thimble.errors import DataError
from thimble.training.run import RunFolder

LEDGER = "sweep.json"
STAMP = "%Y%m%d-%H%M%S"  # the beginning of a run folder's name

# Of the best evaluation what there is of these: how it is called and written.
BITS = "val_bits_per_byte"
FIGURES = {
    BITS: ("bits per byte", ".4f"),
    "val_loss": ("loss", ".4f"),
    "val_perplexity": ("perplexity", ",.2f"),
    "val_teacher_kl": ("KL to teacher", ".4f"),
    "val_teacher_agreement": ("agreement", ".1%"),
}

# A guard would stop the same run again; the other ends may have been the machine's fault.
DONE = ("finished", "stopped")


def read(folder: Path) -> dict[str, Any]:
    """The account of a sweep; DataError when the folder holds none."""
    if not (folder / LEDGER).is_file():
        raise DataError(
            f"{folder} is not a sweep: it has no {LEDGER}. "
            "Give a folder like runs/sweeps/<recipe>/<time>-<slug>."
        )
    sweep = artifacts.read_json(folder / LEDGER)
    if not isinstance(sweep, dict) or sweep.get("kind") != "sweep":
        raise DataError(f"{folder / LEDGER} was not written by a sweep.")
    return sweep


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[dict[str, Any]]:
    """The account, to be changed in place; on success it is written."""
    with open(folder / f".{LEDGER}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep = read(folder)
        yield sweep
        artifacts.write_json(folder / LEDGER, sweep)


def entry(sweep: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any] | None:
    return next((run for run in sweep["runs"] if run["overrides"] == overrides), None)


def begin(folder: Path, overrides: dict[str, Any], number: int) -> dict[str, Any]:
    """Enter that a run begins, unless it is done; returns its entry as it was before."""
    with changing(folder) as sweep:
        run = entry(sweep, overrides)
        if run is None:  # a sweeper that draws its values
            run = {"number": number, "overrides": overrides, "status": "waiting"}
            sweep["runs"].append(run)
        before = dict(run)
        if run["status"] not in DONE:
            run.update(status="running", started=time.strftime(STAMP))
            run.pop("reason", None)
        return before


def end(folder: Path, overrides: dict[str, Any], status: str, **facts: Any) -> dict[str, Any]:
    """Enter how a run ended; returns its entry."""
    with changing(folder) as sweep:
        run = entry(sweep, overrides)
        assert run is not None, "a run ends after its beginning"
        run.update(status=status, **facts)
        return run


def outcome(path: Path | None) -> dict[str, Any]:
    """What a run's records say: its steps, its best evaluation, seconds and tokens of training."""
    if path is None:
        return {}
    records = RunFolder(path).records()
    training = [record for record in records if "loss" in record]
    evaluations = [record for record in records if math.isfinite(measure(record))]
    facts: dict[str, Any] = {"run": str(path)}
    if training:
        last = training[-1]
        facts["steps"], facts["tokens"] = last["step"], last["tokens"]
        facts["seconds"] = last["seconds"]
        facts["tokens_per_second"] = last["tokens"] / max(last["seconds"], 1e-9)
    if evaluations:
        best = min(evaluations, key=measure)
        facts["best_step"] = best["step"]
        facts |= {key: best[key] for key in FIGURES if best.get(key) is not None}
    return facts


def measure(figures: dict[str, Any]) -> float:
    """What runs are compared by: held-out bits per byte, or where nobody knows the bytes, as of
    packed chunks, the loss in nats per token; infinite for neither."""
    known = [figures[key] for key in (BITS, "val_loss") if figures.get(key) is not None]
    return known[0] if known else math.inf


def unit(runs: Iterable[dict[str, Any]]) -> str:
    """Of ``measure``."""
    keys = {key for run in runs for key, value in run.items() if value is not None}
    return "nats per token" if "val_loss" in keys and BITS not in keys else "bits per byte"


def folder_of(config: Config, since: str) -> Path | None:
    """The folder of a run that could not tell it: the newest of this configuration."""
    parent = Path(config.output_dir) / config.recipe
    for path in sorted(parent.glob("*"), reverse=True):
        if path.name < since:
            break
        if (path / CONFIG_FILE).is_file() and load_run(path) == config:
            return path
    return None
