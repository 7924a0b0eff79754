"""The training loop: a page of functions over one ``Trainer``.

    batch -> objective (micro-batches) -> gradients -> clip -> guard -> update

Nothing in a step waits for the device; values reach the host at logging steps.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from thimble import artifacts
from thimble.config import load as configuration
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import DataError, GuardStop, Interrupted
from thimble.models import interop
from thimble.training import beginning, checkpoint, devices, guards, sharding
from thimble.training.data import open_data
from thimble.training.distributed import Processes, ProcessFailed, data_parallel
from thimble.training.ema import EMA
from thimble.training.loggers import Loggers
from thimble.training.optimizer import freeze, make_optimizer, make_sparse_optimizer, schedule
from thimble.training.panel import Panel
from thimble.training.run import Run, RunFolder
from thimble.training.saddle import SaddleWatch, in_words
from thimble.training.signals import StopRequest
from thimble.training.task import make_task

REMEMBERED = 1000  # steps


def train(config: Config, resume: str | Path | None = None) -> Run:
    """Train a model as configured, in a new run folder or, with ``resume``, going on in that one.

    ``resume`` is a run folder, a checkpoint in one, or ``auto`` for the newest run of the recipe;
    a run that was stopped before its first checkpoint begins anew in its folder. Returns the
    finished run. Raises GuardStop when a guard ended it, Interrupted after SIGINT or SIGTERM
    (everything saved), and the errors of bad input before the first step.
    """
    processes = Processes()
    device = devices.resolve_device(config.device)
    with processes.connected(device):
        data = open_data(config)  # bad data is refused before a folder is made
        trainer = Trainer(config, data, device, processes)
        if resume is None:
            path = str(RunFolder.create(config).path) if processes.main else ""
            folder = RunFolder(processes.share(path))
        else:
            folder = RunFolder.to_resume(config, resume)
        lock = artifacts.locked(folder.path, "run") if processes.main else contextlib.nullcontext()
        with lock:
            try:
                processes.lost = lambda error: last_words(folder, trainer, error)
                if resume is not None:
                    trainer.resume(folder, Path(resume))
                return trainer.run(folder)
            except BaseException as error:
                explained = processes.explain(error)
                last_words(folder, trainer, explained)
                if explained is error:
                    raise
                raise explained from error


def last_words(folder: RunFolder, trainer: Trainer, error: BaseException) -> None:
    """What ended the run, into its folder."""
    if not trainer.processes.speaks(error):
        return
    text = "".join(traceback.format_exception(error))
    (folder.path / "error.txt").write_text(text, encoding="utf-8")
    if isinstance(error, ProcessFailed):
        event = {"event": "failed", "step": trainer.state.step, "rank": error.rank}
        folder.append(event | {"reason": str(error)})


class Trainer:
    """Model, task, optimizer and the state of one run."""

    def __init__(
        self, config: Config, data: Any, device: torch.device, processes: Processes
    ) -> None:
        self.config, self.device, self.processes = config, device, processes
        torch.use_deterministic_algorithms(config.training.deterministic)
        generator = torch.Generator().manual_seed(config.seed)
        self.model = interop.new_model(config.model).initialize(generator)
        self.model.compute_dtype = devices.resolve_precision(config.precision, device)
        self.model.checkpoint_activations = config.training.checkpoint_activations
        beginning.with_weights(self.model, config, data)
        if config.optim.freeze_weights:
            freeze(self.model)
        # Nothing here draws from the global generators; seeded, a library below that does repeats.
        torch.manual_seed(config.seed)
        np.random.seed(config.seed % 2**32)
        random.seed(config.seed)
        self.sharded = processes.count > 1 and config.training.data_parallel == "fsdp"
        if not self.sharded:
            self.model.to(device)
        self.task = make_task(config, data, self.model, device, processes, sharded=self.sharded)
        beginning.check_words(config, self.task.tokenizer)
        self.objective: torch.nn.Module = self.task.objective
        if self.sharded:
            sharding.shard(self.objective, device, processes.count, compiled=self.task.compiled)
        elif processes.count > 1:
            self.objective = data_parallel(self.objective)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.sparse = make_sparse_optimizer(self.model, config.optim, processes)
        updated = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        # Embeddings of puzzles are neither clipped nor averaged: few of them are in a batch.
        named = [(n, p) for n, p in self.model.named_parameters() if id(p) in updated]
        self.parameters: list[torch.nn.Parameter] = [parameter for _, parameter in named]
        rate = config.optim.ema_rate
        self.ema = EMA(named, rate) if rate is not None else None
        half = self.model.compute_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.guard = guards.StepGuard(device, config.guards.max_grad_norm)
        self.state = checkpoint.TrainerState()
        self.saddle = SaddleWatch(config.saddle)
        self.rate = 0.0  # the schedule's last factor
        self.loss_sum = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.stop_request = StopRequest(several=processes.count > 1)
        self.places: dict[int, int] = {}  # in the data, before each of the last steps

    # --- the step

    def step(self) -> None:
        """One update from one global batch; leaves loss and gradient norm on the device."""
        state, config = self.state, self.config
        self.places[state.step] = state.windows
        self.places.pop(state.step - REMEMBERED, None)
        pieces = self.task.micro_batches(state)
        loss = torch.zeros((), device=self.device)
        for number, piece in enumerate(pieces, 1):
            last = number == len(pieces)
            with contextlib.nullcontext() if last else self.without_sync():
                part = self.task.loss(self.objective, piece)
                # DDP and FSDP average over processes.
                self.scaler.scale(part * self.processes.count).backward()
            loss += part.detach()
        loss = self.processes.add(loss)
        self.task.settle()

        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optim.grad_clip)
        self.norm = sharding.whole(norm).to(self.device)  # without gradients it is on the host
        half = self.scaler.is_enabled()
        skip = self.guard.observe(state.step, loss, self.norm, half)
        self.rate = schedule(config.optim, state.step, self.task.max_steps, self.task.share(state))
        factor = self.rate * self.saddle.factor(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.learning_rate * factor * group["lr_ratio"]
        if half:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused kernel leaves weights and moments alone when found_inf is 1.
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.sparse is not None:
            self.sparse.param_groups[0]["lr"] = config.optim.puzzle_emb_lr * factor
            # Under a scaler the update of all weights is skipped when one gradient is infinite.
            overflow = ~torch.isfinite(self.norm)
            self.sparse.found_inf = torch.maximum(skip, overflow.float())  # type: ignore[attr-defined]
            self.sparse.step()
            self.sparse.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        self.loss_sum += loss
        state.step += 1
        state.pending_steps += 1

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The model with the averaged weights, where there are any."""
        return self.ema.applied() if self.ema is not None else contextlib.nullcontext()

    def without_sync(self) -> contextlib.AbstractContextManager[None]:
        # Shards are reduced after every micro-batch: whole gradients are what there is no room for.
        if isinstance(self.objective, DistributedDataParallel):
            return self.objective.no_sync()
        return contextlib.nullcontext()

    # --- the run

    def run(self, folder: RunFolder) -> Run:
        state = self.state
        title = f"{self.config.recipe}: {self.model.num_parameters():,} parameters, " + (
            f"{devices.describe(self.device)}, {str(self.model.compute_dtype).split('.')[1]}"
        )
        baselines = self.task.baselines() if self.processes.main else {}
        loggers = Loggers(self.config, folder.path) if self.processes.main else None
        self.panel = Panel(title, self.task.expected_steps(state), baselines)
        self.folder, self.loggers = folder, loggers
        shown = self.panel if self.processes.main else contextlib.nullcontext()
        with self.stop_request.listening(), shown:
            if self.processes.main:
                log.info("%s", title)
                log.info("run folder: %s", folder.path)
            if self.done:
                log.info("All %d steps are done; for more: training.max_steps=N", state.step)
            devices.reset_peak_memory(self.device)
            self.started = self.clock = time.perf_counter()
            try:
                while not self.done:
                    verdict = None
                    try:
                        self.one_round()
                    except (RuntimeError, MemoryError) as error:
                        verdict = self.out_of_memory(error)
                        if verdict is None:
                            raise
                    if verdict:  # outside, so that no traceback keeps the step's memory
                        self.stop(verdict)
            finally:
                if loggers:
                    loggers.close()
        if self.processes.main:
            folder.append({"event": "finished", "step": state.step})
        return folder.to_run("finished", state.step)

    @property
    def done(self) -> bool:
        return self.task.finished(self.state)

    def one_round(self) -> None:
        """A step, and what is due after it. The processes meet at its end."""
        training = self.config.training
        self.step()
        if self.processes.count == 1:
            self.check(synchronize=False)
        step, last = self.state.step, self.done
        if step % training.log_every == 0 or last:
            self.log_step()
        each = training.eval_every
        evaluate = each > 0 and (step % each == 0 or last)
        best = self.evaluate() if evaluate else False
        if best or step % training.save_every == 0 or last:
            self.save(best)
        # Hosts run ahead of their devices, so one may see a bad step before the others do.
        bad, asked = self.processes.any(self.guard.verdict() is not None, bool(self.stop_request))
        if bad:
            self.check(synchronize=True)
        if asked:
            self.leave()

    def check(self, *, synchronize: bool) -> None:
        verdict = self.guard.verdict(synchronize=synchronize)
        if verdict:
            self.stop(verdict)

    def out_of_memory(self, error: BaseException) -> guards.Verdict | None:
        """The verdict when it is this process, or another one, that has no memory left."""
        if guards.is_out_of_memory(error):
            training = self.config.training
            verdict = guards.out_of_memory(
                self.state.step,
                error,
                training.micro_batch_size,
                training.gradient_accumulation_steps,
            )
            self.processes.tell(
                reason=verdict.reason, status=GuardStop.status, verdict=vars(verdict)
            )
            return verdict
        note = self.processes.told(error) or {}
        return guards.Verdict(**note["verdict"]) if "verdict" in note else None

    def log_step(self) -> None:
        """Bring the step's values to the host, once, and write the record."""
        state, training = self.state, self.config.training
        self.check(synchronize=True)
        loss_sum, norm = torch.stack([self.loss_sum, self.norm]).tolist()
        loss = loss_sum / state.pending_steps
        self.settle_clock()
        rate = self.optimizer.param_groups[0]["lr"]
        record = {
            "step": state.step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": self.session_tokens / max(self.session_seconds, 1e-9),
            "memory_bytes": devices.memory_bytes(self.device),
            "tokens": state.tokens,
            "epoch": state.windows / self.task.per_epoch,
            "seconds": state.seconds,
            **self.task.record(rate),
        }
        self.loss_sum.zero_()
        state.pending_steps = 0
        self.session_tokens, self.session_seconds = 0, 0.0
        self.write(record)
        if self.processes.main:
            self.panel.total = self.task.expected_steps(state)
            self.panel.trained(record)
        event = self.saddle.observe(state.step, loss, norm, rate=self.rate)
        state.saddle = self.saddle.to_dict()
        if event and self.processes.main:
            self.folder.append(event)
            log.info("step %d  %s", state.step, in_words(event))
        plateau = guards.observe_loss(
            state, loss, training.log_every, self.config.guards.plateau_steps
        )
        if plateau:
            self.stop(plateau)

    session_tokens = 0
    session_seconds = 0.0
    counted_tokens = 0

    def settle_clock(self) -> None:
        """Count the time since the last call as training; what comes next restarts the clock."""
        now = time.perf_counter()
        self.session_seconds += now - self.clock
        self.session_tokens += self.state.tokens - self.counted_tokens
        self.state.seconds += now - self.clock
        self.clock, self.counted_tokens = now, self.state.tokens

    def evaluate(self) -> bool:
        """Figures of held-out data and samples; True when it is the best so far."""
        state = self.state
        self.settle_clock()
        with self.averaged(), sharding.usable(self.objective):
            figures = self.task.evaluate()
            samples = self.task.samples()
        record = {"step": state.step, **figures}
        if self.processes.main and samples:
            self.folder.samples.mkdir(exist_ok=True)
            text = "\n\n---\n\n".join(samples) + "\n"
            artifacts.write_text(self.folder.samples / f"step-{state.step:06d}.txt", text)
        if self.processes.main and figures:
            self.write(record)
            self.panel.evaluated(record, samples[0] if samples else "")
        self.clock = time.perf_counter()
        loss = figures.get("val_loss", math.nan)
        if not (self.task.selects and math.isfinite(loss)):
            return False
        perplexity = figures["val_perplexity"]
        best = state.best_perplexity is None or perplexity < state.best_perplexity
        if best:
            state.best_perplexity, state.best_step = perplexity, state.step
        return best

    def write(self, record: dict[str, Any]) -> None:
        if self.processes.main:
            self.folder.append(record)
            assert self.loggers is not None
            self.loggers.write(record)

    # --- saving, stopping, resuming

    def save(self, best: bool) -> None:
        state = self.state
        self.settle_clock()
        # The record being collected belongs into the checkpoint, too.
        state.pending_loss = self.loss_sum.item()
        self.check(synchronize=True)
        main = self.processes.main
        directory = self.folder.checkpoints / f"step-{state.step:06d}"
        missing = main and (not directory.exists() or bool(checkpoint.problems(directory)))
        if self.processes.any(missing)[0]:
            between = self.task.tensors()
            trained = self.ema.trained() if self.ema is not None and main else {}
            with self.averaged():
                model, optimizer = sharding.gather(self.model, self.optimizer, keep=main)
                if main:
                    checkpoint.save(
                        directory,
                        model,
                        optimizer,
                        self.scaler,
                        self.task.tokenizer,
                        state,
                        self.config,
                        self.task.cursor(state),
                        tensors={"carry": between, "trained": trained},
                        documents=self.task.documents(),
                    )
        if main:
            self.folder.point("latest", directory)
            if best:
                self.folder.point("best", directory)
            kept = {f"step-{state.best_step:06d}"} if state.best_step is not None else set()
            checkpoint.prune(self.folder.checkpoints, self.config.training.keep_last, kept)
        self.clock = time.perf_counter()

    def resume(self, folder: RunFolder, given: Path) -> None:
        if not checkpoint.steps(folder.checkpoints):
            log.info("%s has no checkpoint yet and begins anew.", folder.path)
            if self.processes.main:
                folder.rewind(-1)
                folder.append({"event": "resumed", "step": 0})
            return
        main = self.processes.main
        # One process reads and hashes them all; the others take its word.
        newest = str(checkpoint.newest_valid(folder.checkpoints)) if main else ""
        directory = Path(self.processes.share(newest))
        if given.name != directory.name and checkpoint.STEP.match(given.name):
            raise DataError(
                f"{given} is not the newest usable checkpoint of its run, {directory.name} is. "
                f"Resume the run itself, or move the newer ones away:\n  --resume {folder.path}"
            )
        self.state, cursor = checkpoint.restore(directory, self.model, self.optimizer, self.scaler)
        mine = self.task.cursor(self.state)
        for key in ("tokens", "seed", "sequence_length"):
            if cursor[key] != mine[key]:
                raise DataError(
                    f"{directory} was trained with {key}={cursor[key]}, now it is {mine[key]}: "
                    "its place in the data would mean nothing. Start a new run instead."
                )
        self.task.resume(cursor, checkpoint.tensors(directory, "carry"))
        if self.ema is not None:
            self.ema.resume(checkpoint.tensors(directory, "trained"))
        before = configuration.load_run(directory).objective.name
        if before != self.config.objective.name:
            self.begin_objective(folder, before)
        stops = [record for record in folder.records() if record.get("event") == "guard"]
        if stops and stops[-1]["kind"] == "plateau" and stops[-1]["step"] >= self.state.step:
            self.state.lowest_loss = None  # it has been seen; whoever goes on begins to count anew
        self.saddle = SaddleWatch(self.config.saddle, self.state.saddle)
        self.loss_sum.fill_(self.state.pending_loss)
        self.counted_tokens = self.state.tokens
        if self.processes.main:
            folder.rewind(self.state.step)
            folder.append({"event": "resumed", "step": self.state.step})
        log.info("resuming from %s (step %d)", directory, self.state.step)

    def begin_objective(self, folder: RunFolder, before: str) -> None:
        """Go on with weights, optimizer and place in the data, and another loss than before.

        What was remembered of losses is of the other one. The run's own configuration becomes the
        present one, so that it is gone on with; the former stays beside it.
        """
        state, now = self.state, self.config.objective.name
        state.lowest_loss = state.smoothed_loss = state.saddle = None
        state.pending_loss, state.pending_steps = 0.0, 0
        log.info("step %d: from objective %s to %s", state.step, before, now)
        if not self.processes.main:
            return
        former = folder.path / f"config.until-step-{state.step:06d}.yaml"
        if not former.exists():  # else an attempt before this one came to no checkpoint
            (folder.path / configuration.CONFIG_FILE).rename(former)
        configuration.save(self.config, folder.path / configuration.CONFIG_FILE)
        event: dict[str, Any] = {"event": "objective", "step": state.step}
        event |= {"from": before, "to": now, "former_config": former.name}
        folder.append(event | self.task.documents())

    def stop(self, verdict: guards.Verdict) -> None:
        """End the run; checkpoints and pointers stay as they are."""
        latest = self.folder.pointed("latest")
        event = {
            "event": "guard",
            "kind": verdict.kind,
            "step": verdict.step,
            "reason": verdict.reason,
            "windows": self.windows_of(verdict.step),
        }
        if self.processes.main:
            self.folder.append(event)
        good = (
            f"The last good checkpoint is {latest}." if latest else "No checkpoint was saved yet."
        )
        message = f"Stopped at step {verdict.step:,}: {verdict.reason}. {good} {verdict.advice}"
        raise GuardStop(message, self.folder.path, event)

    def windows_of(self, step: int) -> list[int]:
        """What this step took from the data, or the last one before it that took anything:
        [first, end) in their order. On a GPU the host may learn of a bad step a few steps later."""
        first = end = self.places.get(step + 1, self.state.windows)
        while first == end and step in self.places:
            first, step = self.places[step], step - 1
        return [first, end]

    def leave(self) -> None:
        step = self.state.step
        self.save(best=False)
        if self.processes.main:
            self.folder.append({"event": "interrupted", "step": step})
        raise Interrupted(
            f"Interrupted; everything is saved at step {step:,}. Go on with:\n"
            f"  thimble train {self.config.recipe} --resume {self.folder.path}"
        )
