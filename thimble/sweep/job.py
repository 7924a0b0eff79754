"""One job of a sweep: what Hydra calls for each combination, here or in another process."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thimble import console
from thimble.config.load import load
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import GuardStop, Interrupted
from thimble.sweep import ledger, teaching, words
from thimble.terminal import explain_error


@dataclass(frozen=True)
class Job:
    """Trains one combination and returns its objective, to be minimised.

    A launcher may pickle it and call it in another process. Nothing but an interruption leaves it
    as an exception: a failed run is entered with its reason, and the next one begins.
    """

    folder: Path
    recipe: str
    fixed: dict[str, Any]
    total: int | None
    caches: teaching.Caches = field(default_factory=dict)
    teachers: dict[str, str] = field(default_factory=dict)  # ``training.data.teachers_now``
    process: int = field(default_factory=os.getpid)
    directory: str = field(default_factory=os.getcwd)

    def __call__(self, composed: Any) -> float:
        """``ledger.measure`` of the best evaluation, infinite for a run that did not finish.

        ``composed`` is Hydra's configuration of the job and is not looked at: the recipe is
        composed and checked by ``thimble.config``, as for ``thimble train``.
        """
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        here = os.getpid() == self.process
        if not here:
            os.chdir(self.directory)
            console.setup(-1)  # the process that started the sweep says how the runs come along
        overrides = words.settings(hydra.overrides.task)
        before = ledger.begin(self.folder, overrides, hydra.job.num + 1)
        if before["status"] in ledger.DONE:
            return objective(before)
        if here:
            say({**before, "status": "running"}, self.total)
        try:
            after = self.train(overrides, before)
        finally:
            clean_up()
        if here:
            say(after, self.total)
        return objective(after)

    def train(self, overrides: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        """Train, or go on with what an earlier attempt left, and enter the end."""
        from thimble.training import train
        from thimble.training.data import with_teacher

        since, config, run = time.strftime(ledger.STAMP), None, None
        try:
            config = load(self.recipe, nested={**self.fixed, **overrides})
            config = teaching.taught(with_teacher(config, self.teachers), self.caches)
            run = self.left_by(before, config)
            run = train(config, resume=run).path
        except (Interrupted, KeyboardInterrupt):
            self.end(overrides, "interrupted", run or unknown(config, since))
            # Hydra takes an Exception for the end of one job; this is the end of all.
            raise KeyboardInterrupt from None
        except GuardStop as error:
            return self.end(overrides, "stopped", error.run, error)
        except Exception as error:
            return self.end(overrides, "failed", run or unknown(config, since), error)
        return self.end(overrides, "finished", run)

    def left_by(self, before: dict[str, Any], config: Config) -> Path | None:
        if before["status"] == "waiting":
            return None
        return Path(before["run"]) if "run" in before else unknown(config, before["started"])

    def end(
        self,
        overrides: dict[str, Any],
        status: str,
        run: Path | None,
        error: Exception | None = None,
    ) -> dict[str, Any]:
        facts = ledger.outcome(run)
        if error is not None:
            facts["reason"], facts["exit_status"] = explain_error(error, ["-v"])
        return ledger.end(self.folder, overrides, status, **facts)


def unknown(config: Config | None, since: str) -> Path | None:
    return ledger.folder_of(config, since) if config else None


def objective(run: dict[str, Any]) -> float:
    return ledger.measure(run) if run["status"] == "finished" else math.inf


def say(run: dict[str, Any], total: int | None) -> None:
    """That a run begins, or how it ended, in one line."""
    name = f"run {run['number']}" + (f" of {total}" if total else "")
    if run["status"] == "running":
        log.info("%s: %s", name, words.text(run["overrides"]))
    elif run["status"] == "finished":
        log.info("%s: %.3f %s", name, objective(run), ledger.unit([run]))
    else:
        log.warning("%s %s: %s", name, run["status"], run.get("reason", "see its log"))


def clean_up() -> None:
    """Leave nothing of this run to the next one in this process."""
    import torch

    gc.collect()  # the model, and what a traceback held
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if "torch._dynamo" in sys.modules:  # its cache is bounded: the ninth shape would run uncompiled
        torch.compiler.reset()
