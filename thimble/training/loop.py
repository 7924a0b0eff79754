"""The training loop: a page of functions over one ``Trainer``.

    batch -> objective (micro-batches) -> gradients -> clip -> guard -> update

Nothing in a step waits for the device; values reach the host at logging steps.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
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
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import DataError, GuardStop, Interrupted
from thimble.evaluation.perplexity import evaluate_split
from thimble.generation.sampling import generate_ids
from thimble.models.causal_lm import CausalLM
from thimble.objectives.linear_cross_entropy import token_losses
from thimble.objectives.next_token import NextToken
from thimble.tokens.loader import Windows
from thimble.tokens.shards import TokenSplit
from thimble.tokens.tokenizer import load_tokenizer
from thimble.training import checkpoint, devices, guards, sharding
from thimble.training.compilation import should_compile
from thimble.training.distributed import Processes, ProcessFailed
from thimble.training.loggers import Loggers
from thimble.training.optimizer import learning_rate, make_optimizer
from thimble.training.panel import Panel
from thimble.training.plan import total_steps, training_tokens
from thimble.training.run import Run, RunFolder
from thimble.training.signals import StopRequest


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
        data = training_tokens(config)  # bad data is refused before a folder is made
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
    """Model, data, optimizer and the state of one run."""

    def __init__(
        self, config: Config, data: TokenSplit, device: torch.device, processes: Processes
    ) -> None:
        self.config, self.data, self.device, self.processes = config, data, device, processes
        self.windows = Windows(data.tokens, config.training.sequence_length, config.seed)
        self.batch_size = (
            config.training.micro_batch_size * config.training.gradient_accumulation_steps
        )
        self.rows = processes.rows(self.batch_size)
        self.max_steps = total_steps(config, self.windows.count)
        self.tokenizer = load_tokenizer(config.data.path)
        self.fingerprint: str = data.manifest["fingerprint"]
        torch.use_deterministic_algorithms(config.training.deterministic)

        generator = torch.Generator().manual_seed(config.seed)
        self.model = CausalLM(config.model).initialize(generator)
        self.model.compute_dtype = devices.resolve_precision(config.precision, device)
        self.model.checkpoint_activations = config.training.checkpoint_activations
        # Nothing here draws from the global generators; seeded, a library below that does repeats.
        torch.manual_seed(config.seed)
        np.random.seed(config.seed % 2**32)
        random.seed(config.seed)
        compiled = should_compile(config, self.model, self.max_steps, device)
        self.sharded = processes.count > 1 and config.training.data_parallel == "fsdp"
        objective = NextToken(self.model, compiled=compiled and not self.sharded)
        self.objective: torch.nn.Module = objective
        if self.sharded:
            sharding.shard(objective, device, processes.count, compiled=compiled)
        else:
            self.model.to(device)
            if processes.count > 1:
                self.objective = DistributedDataParallel(objective)
        self.optimizer = make_optimizer(self.model, config.optim)
        half = self.model.compute_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.parameters = list(self.model.parameters())
        self.guard = guards.StepGuard(device, config.guards.max_grad_norm)
        self.state = checkpoint.TrainerState()
        self.loss_sum = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.stop_request = StopRequest(several=processes.count > 1)

    # --- the step

    def step(self) -> None:
        """One update from one global batch; leaves loss and gradient norm on the device."""
        state, config = self.state, self.config
        for first, end in sorted(config.training.skip_windows):
            if first < state.windows + self.batch_size and state.windows < end:
                state.windows = end
        inputs, targets = self.windows.batch(state.windows, self.batch_size)
        # The mean over all targets of the step: whatever way it is split, the same gradient.
        count = int((targets != -100).sum())
        scale = self.processes.count / max(count, 1)  # DDP and FSDP average over processes
        inputs_dev, targets_dev = self.to_device(inputs), self.to_device(targets)
        micro = config.training.micro_batch_size
        pieces = list(range(0, len(inputs_dev), micro))
        loss = torch.zeros((), device=self.device)
        for start in pieces:
            last = start == pieces[-1]
            with contextlib.nullcontext() if last else self.without_sync():
                piece = self.objective(
                    inputs_dev[start : start + micro], targets_dev[start : start + micro]
                )
                self.scaler.scale(piece * scale).backward()
            loss += piece.detach()
        loss = self.processes.add(loss) / max(count, 1)

        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optim.grad_clip)
        self.norm = sharding.whole(norm)
        half = self.scaler.is_enabled()
        skip = self.guard.observe(state.step, loss, self.norm, half)
        for group in self.optimizer.param_groups:
            rate = learning_rate(config.optim, state.step, self.max_steps)
            group["lr"] = rate * group["lr_ratio"]
        if half:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused kernel leaves weights and moments alone when found_inf is 1.
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss
        state.step += 1
        state.windows += self.batch_size
        state.tokens += count
        state.pending_steps += 1

    def to_device(self, rows: Any) -> torch.Tensor:
        tensor = torch.from_numpy(rows[self.rows])
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

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
        baselines = self.baselines() if self.processes.main else {}
        loggers = Loggers(self.config, folder.path) if self.processes.main else None
        self.panel = Panel(title, self.max_steps, baselines)
        self.folder, self.loggers = folder, loggers
        shown = self.panel if self.processes.main else contextlib.nullcontext()
        with self.stop_request.listening(), shown:
            if self.processes.main:
                log.info("%s", title)
                log.info("run folder: %s", folder.path)
            if state.step >= self.max_steps:
                log.info("All %d steps are done; for more: training.max_steps=N", self.max_steps)
            devices.reset_peak_memory(self.device)
            self.started = self.clock = time.perf_counter()
            try:
                while state.step < self.max_steps:
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

    def one_round(self) -> None:
        """A step, and what is due after it. The processes meet at its end."""
        training = self.config.training
        self.step()
        if self.processes.count == 1:
            self.check(synchronize=False)
        step, last = self.state.step, self.state.step == self.max_steps
        if step % training.log_every == 0 or last:
            self.log_step()
        evaluate = step % training.eval_every == 0 or last
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
        record = {
            "step": state.step,
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens_per_second": self.session_tokens / max(self.session_seconds, 1e-9),
            "memory_bytes": devices.memory_bytes(self.device),
            "tokens": state.tokens,
            "epoch": state.windows / self.windows.count,
            "seconds": state.seconds,
        }
        self.loss_sum.zero_()
        state.pending_steps = 0
        self.session_tokens, self.session_seconds = 0, 0.0
        self.write(record)
        if self.processes.main:
            self.panel.trained(record)
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
        """Validation loss, perplexity, bits per byte, samples; True when it is the best so far."""
        config, state = self.config, self.state
        self.settle_clock()
        with sharding.usable(self.objective):
            result = evaluate_split(
                functools.partial(self.processes.by_rows, self.token_losses),
                TokenSplit(config.data.path, "val"),
                config.training.sequence_length,
                config.training.micro_batch_size * self.processes.count,
                config.evaluation.max_tokens,
                device=self.device,
            )
            wanted = self.processes.main or self.sharded  # a sharded model needs all of them
            samples = [self.sample(prompt) for prompt in config.evaluation.prompts if wanted]
        record = {
            "step": state.step,
            "val_loss": result["loss"],
            "val_perplexity": result["perplexity"],
            "val_bits_per_byte": result["bits_per_byte"],
            "val_tokens": result["tokens"],
        }
        if self.processes.main:
            self.folder.samples.mkdir(exist_ok=True)
            text = "\n\n---\n\n".join(samples) + "\n"
            artifacts.write_text(self.folder.samples / f"step-{state.step:06d}.txt", text)
            self.write(record)
            self.panel.evaluated(record, samples[0] if samples else "")
        self.clock = time.perf_counter()
        perplexity = result["perplexity"]
        if not math.isfinite(perplexity):
            return False
        best = state.best_perplexity is None or perplexity < state.best_perplexity
        if best:
            state.best_perplexity, state.best_step = perplexity, state.step
        return best

    def token_losses(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_losses(self.model.hidden(inputs), self.model.head.weight, targets)

    def sample(self, prompt: str) -> str:
        options, end = self.config.evaluation, self.tokenizer.eot_id
        ids = generate_ids(
            self.model,
            self.tokenizer.encode(prompt) or [end],
            max_tokens=options.sample_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=1.0,
            seed=self.config.seed,
            # All processes of a sharded model must come to the same number of steps.
            stop=frozenset() if self.sharded else frozenset({end}),
        )
        return prompt + self.tokenizer.decode(list(itertools.takewhile(end.__ne__, list(ids))))

    def baselines(self) -> dict[str, float]:
        from thimble.evaluation.baselines import known_rungs

        return known_rungs(self.config.data.path, "val")

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
            model, optimizer = sharding.gather(self.model, self.optimizer, keep=main)
            if main:
                checkpoint.save(
                    directory,
                    model,
                    optimizer,
                    self.scaler,
                    self.tokenizer,
                    state,
                    self.config,
                    self.cursor(),
                )
        if main:
            self.folder.point("latest", directory)
            if best:
                self.folder.point("best", directory)
            kept = {f"step-{state.best_step:06d}"} if state.best_step is not None else set()
            checkpoint.prune(self.folder.checkpoints, self.config.training.keep_last, kept)
        self.clock = time.perf_counter()

    def cursor(self) -> dict[str, Any]:
        return {
            "tokens": self.fingerprint,
            "seed": self.config.seed,
            "sequence_length": self.config.training.sequence_length,
            "windows_seen": self.state.windows,
            "windows_per_epoch": self.windows.count,
        }

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
        mine = self.cursor()
        for key in ("tokens", "seed", "sequence_length"):
            if cursor[key] != mine[key]:
                raise DataError(
                    f"{directory} was trained with {key}={cursor[key]}, now it is {mine[key]}: "
                    "its place in the data would mean nothing. Start a new run instead."
                )
        stops = [record for record in folder.records() if record.get("event") == "guard"]
        if stops and stops[-1]["kind"] == "plateau" and stops[-1]["step"] >= self.state.step:
            self.state.lowest_loss = None  # it has been seen; whoever goes on begins to count anew
        self.loss_sum.fill_(self.state.pending_loss)
        self.counted_tokens = self.state.tokens
        if self.processes.main:
            folder.rewind(self.state.step)
            folder.append({"event": "resumed", "step": self.state.step})
        log.info("resuming from %s (step %d)", directory, self.state.step)

    def stop(self, verdict: guards.Verdict) -> None:
        """End the run; checkpoints and pointers stay as they are."""
        latest = self.folder.pointed("latest")
        # On a GPU the host may learn of a bad step a few steps later.
        place = self.state.windows - (self.state.step - verdict.step) * self.batch_size
        event = {
            "event": "guard",
            "kind": verdict.kind,
            "step": verdict.step,
            "reason": verdict.reason,
            "windows": [place, place + self.batch_size],
        }
        if self.processes.main:
            self.folder.append(event)
        good = (
            f"The last good checkpoint is {latest}." if latest else "No checkpoint was saved yet."
        )
        message = f"Stopped at step {verdict.step:,}: {verdict.reason}. {good} {verdict.advice}"
        raise GuardStop(message, self.folder.path, event)

    def leave(self) -> None:
        step = self.state.step
        self.save(best=False)
        if self.processes.main:
            self.folder.append({"event": "interrupted", "step": step})
        raise Interrupted(
            f"Interrupted; everything is saved at step {step:,}. Go on with:\n"
            f"  thimble train {self.config.recipe} --resume {self.folder.path}"
        )
