"""Training that mends itself: a stopped run is looked at, changed in one way, and goes on.

    guard stops -> its record -> one change of the configuration -> last good checkpoint -> train

Every attempt, what it saw and what it changed is in the run's ``attempts.json``.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from thimble import artifacts
from thimble.config import load as configuration
from thimble.config.describe import as_override
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import GuardStop
from thimble.training import loop
from thimble.training.devices import resolve_device
from thimble.training.distributed import Processes
from thimble.training.run import Run, RunFolder

ATTEMPTS = "attempts.json"
EVIDENCE = 5  # records before the failure that are kept with it


def train_with_retries(config: Config, retries: int, resume: str | Path | None = None) -> Run:
    """``loop.train``, and after a guard's stop up to ``retries`` times again with a remedy.

    Raises GuardStop when the attempts are used up or nothing is left to change; whatever else ends
    a run is not retried.
    """
    processes = Processes()  # all come to the same remedy, the first one writes it down
    if not retries:
        return loop.train(config, resume)
    attempts: list[dict[str, Any]] = []
    if resume is not None:
        earlier = RunFolder.to_resume(config, resume).path / ATTEMPTS
        attempts = artifacts.read_json(earlier) if earlier.is_file() else []
    for attempt in range(retries + 1):
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            run = loop.train(config, resume=resume)
        except GuardStop as error:
            folder = RunFolder(error.run)
            resume = folder.path
            failure = _failure(folder, error.event)
            last = attempt == retries
            # A device that waits for what another process has given up is not sure to come back.
            gpus = processes.count > 1 and resolve_device(config.device).type == "cuda"
            stuck = gpus and failure["kind"] == "out_of_memory"
            change = {}
            if not (last or stuck):
                change = remedy(failure["kind"], failure["windows"], config, attempts)
            before = config.model_dump(mode="json")
            attempts.append(
                {
                    "attempt": len(attempts) + 1,
                    "started": started,
                    "outcome": "stopped",
                    **failure,
                    "checkpoint": str(folder.pointed("latest") or "none yet"),
                    "change": {
                        key: {
                            "from": functools.reduce(dict.__getitem__, key.split("."), before),
                            "to": value,
                        }
                        for key, value in change.items()
                    },
                }
            )
            if processes.main:
                artifacts.write_json(folder.path / ATTEMPTS, attempts)
            if not change:
                what = "nothing is left to change"
                if last:
                    what = f"attempt {attempt + 1} was the last"
                elif stuck:
                    what = "several processes on GPUs do not mend this: change it and --resume"
                raise GuardStop(
                    f"{error} Given up: {what}; see {folder.path / ATTEMPTS}.",
                    folder.path,
                    error.event,
                ) from error
            words = " ".join(f"{key}={as_override(value)}" for key, value in change.items())
            config = changed(config, change)
            if processes.main:
                log.warning("attempt %d: %s", attempt + 1, failure["reason"])
                log.warning("attempt %d of %d goes on with %s", attempt + 2, retries + 1, words)
                configuration.save(config, folder.path / configuration.CONFIG_FILE)
        else:
            if attempts and processes.main:
                done = {"attempt": len(attempts) + 1, "started": started, "outcome": run.status}
                artifacts.write_json(run.path / ATTEMPTS, [*attempts, done])
            return run
        gc.collect()  # the stopped attempt's model, which its traceback held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise AssertionError("unreachable: the last attempt returns or raises")


def _failure(folder: RunFolder, event: Mapping[str, Any]) -> dict[str, Any]:
    """The event of a stop, with the records that led to it."""
    before = [record for record in folder.records() if "loss" in record][-EVIDENCE:]
    kept = ("step", "loss", "grad_norm", "learning_rate", "memory_bytes")
    return {
        "kind": event["kind"],
        "step": event["step"],
        "reason": event["reason"],
        "windows": event["windows"],
        "evidence": [{key: record[key] for key in kept if key in record} for record in before],
    }


def remedy(
    kind: str, windows: list[int], config: Config, attempts: list[dict[str, Any]]
) -> dict[str, Any]:
    """The keys to change for the next attempt; none when there is nothing to try.

    ``nan`` and ``explosion``: half the learning rate, twice the warm-up, and the batch at which it
    happened is passed over. ``out_of_memory``: half the micro-batch with as many more of them; the
    second time, or when it cannot be halved, activations are computed again in the backward pass.
    ``plateau``: twice the learning rate, once.
    """
    training, optim = config.training, config.optim
    if kind in ("nan", "explosion"):
        return {
            "optim.learning_rate": optim.learning_rate / 2,
            "optim.warmup_steps": max(2 * optim.warmup_steps, 1),
            "training.skip_windows": [*training.skip_windows, windows],
        }
    if kind == "out_of_memory":
        change: dict[str, Any] = {}
        micro = training.micro_batch_size
        if micro > 1:
            smaller = max(n for n in range(1, micro // 2 + 1) if micro % n == 0)
            change["training.micro_batch_size"] = smaller
            change["training.gradient_accumulation_steps"] = (
                training.gradient_accumulation_steps * (micro // smaller)
            )
        again = any(attempt.get("kind") == kind for attempt in attempts)
        if (again or micro == 1) and not training.checkpoint_activations:
            change["training.checkpoint_activations"] = True
        return change
    if kind == "plateau" and not any(attempt.get("kind") == kind for attempt in attempts):
        return {"optim.learning_rate": min(2 * optim.learning_rate, 1.0)}
    return {}


def changed(config: Config, change: dict[str, Any]) -> Config:
    """The configuration with these dotted keys set, checked like any other."""
    values = config.model_dump(mode="python")
    for key, value in change.items():
        group, name = key.split(".")
        values[group][name] = value
    return Config.model_validate(values)
