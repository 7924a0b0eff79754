"""``thimble teacher finetune``: a teacher made used to the data by low-rank changes (LoRA).

Every linear map W but the head becomes W + 2 B A, A and B of rank r, and only these are trained (Hu
et al. 2021, arXiv:2106.09685, with alpha = 2 r). The labels of a row are shifted by the data set,
once, and the loss goes from hidden states to nats in chunks, as in training a student.

    OUTPUT/checkpoints/step-NNNNNN   adapter, optimizer, generators, place: what it takes to go on
    OUTPUT/adapter                   what PEFT reads
    OUTPUT/merged                    the whole model with the change added, what transformers reads
    OUTPUT/finetune.json             perplexity of both, and the course of the loss
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thimble import artifacts
from thimble.console import log, progress
from thimble.errors import ConfigError, DataError, GuardStop, Interrupted
from thimble.objectives.linear_cross_entropy import linear_cross_entropy
from thimble.teachers import models
from thimble.teachers.examples import Examples, Rows
from thimble.teachers.models import LoadedModel
from thimble.tokens.loader import permute
from thimble.training import checkpoint
from thimble.training.devices import PRECISIONS, resolve_precision
from thimble.training.signals import StopRequest

if TYPE_CHECKING:
    from rich.console import Console

DROPOUT = 0.05
FLOOR = 0.1  # of the peak learning rate, where the cosine ends
KEPT = 2  # checkpoints
ADAPTER_FILE = "adapter_model.safetensors"
RESULT = "finetune.json"


@dataclass(frozen=True)
class Options:
    """How to train. ``batch_rows`` rows a step, ``micro_batch_rows`` of them at a time."""

    rank: int = 64
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    max_steps: int | None = None  # default: one epoch
    batch_rows: int = 8
    micro_batch_rows: int = 2
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    eval_every: int = 200
    eval_rows: int = 128
    save_every: int = 200
    log_every: int = 10
    checkpoint_activations: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("rank", "batch_rows", "micro_batch_rows", "eval_every", "eval_rows",
                     "save_every", "log_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps={self.max_steps}: give at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate}: give a number above 0.")

    def total_steps(self, rows: int) -> int:
        return self.max_steps or math.ceil(rows / self.batch_rows)

    def rate(self, step: int, total: int) -> float:
        """Of the update number ``step`` (from 0): linear warm-up, then a cosine to a tenth."""
        warmup = min(self.warmup_steps, total // 2)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, total - 1 - warmup)
        return self.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class State:
    """Where a run is; ``state.json`` of a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    base_perplexity: float | None = None
    perplexity: dict[str, float] = field(default_factory=dict)  # step -> of the held-out rows
    loss: dict[str, float] = field(default_factory=dict)  # step -> mean of the steps until there
    pending: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Finetuned:
    """The fine-tuned teacher. ``improvement`` is the share by which the perplexity fell."""

    adapter: Path
    merged: Path
    steps: int
    tokens: int
    trained_parameters: int
    base_perplexity: float
    perplexity: float
    seconds: float

    @property
    def improvement(self) -> float:
        return 1 - self.perplexity / self.base_perplexity

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "improvement": self.improvement}

    def render(self, console: Console) -> None:
        change = f"{abs(self.improvement):.1%} {'lower' if self.improvement >= 0 else 'HIGHER'}"
        console.print(
            f"validation perplexity {self.perplexity:.3f}, {change} than the teacher's "
            f"{self.base_perplexity:.3f}\n"
            f"{self.steps:,} steps, {self.tokens:,} tokens, {self.seconds:.0f} s, "
            f"{self.trained_parameters:,} parameters trained\n"
            f"adapter  {self.adapter}\nmerged   {self.merged}"
        )


def finetune(
    name: str | Path,
    train: Examples,
    validation: Examples,
    output: str | Path,
    options: Options,
    *,
    device: torch.device,
    precision: str = "auto",
    ram_disk: bool = False,
    resume: str | Path | None = None,
) -> Finetuned:
    """Fine-tune the teacher ``name`` (folder, run of ours, hub) and write adapter and whole model.

    ``resume``: a checkpoint of it, or ``auto``, the newest whole one below ``output``. Raises
    ConfigError when ``output`` holds something already, DataError for a teacher of another
    vocabulary or a checkpoint of something else, GuardStop when a loss is no number, Interrupted
    after a signal; the last checkpoint is whole then.
    """
    peft = models.import_peft()
    output = Path(output)
    folder = models.find(name)
    models.check_vocabulary(folder, train)
    with artifacts.locked(output, "the fine-tuning"):
        source = starting_point(output, resume)
        who = {
            "teacher": models.weights_hash(folder),
            "train": train.identity,
            "validation": validation.identity,
            "rank": options.rank,
            "seed": options.seed,
            "batch_rows": options.batch_rows,
            "eval_rows": options.eval_rows,  # before and after are of the same ones
        }
        if source is not None:
            check_same(source, who)
        loaded = models.load(
            folder,
            device=device,
            dtype=resolve_precision(precision, device),
            ram_disk=ram_disk,
        )
        models.check_fits(loaded, train)
        torch.manual_seed(options.seed)
        settings = peft.LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            lora_dropout=DROPOUT,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(name),
        )
        model: Any = loaded.model
        if options.checkpoint_activations:
            enable_checkpointing(model)
        model.name_or_path = str(name)  # for the adapter; not where it was copied to
        adapted = peft.get_peft_model(model, settings)
        loaded = loaded.limited(train.vocab_size)
        run = Run(loaded, adapted, train, validation, options, who, output)
        if source is not None:
            run.restore(source)
        state = run.train()
        adapter = run.save_adapter(output / "adapter")
        count = sum(p.numel() for p in run.parameters)
        del run, adapted, loaded, model
        merged = save_merged(name, folder, adapter, output / "merged", who)
        assert state.base_perplexity is not None
        result = Finetuned(
            adapter,
            merged,
            state.step,
            state.step * options.batch_rows * train.length,
            count,
            state.base_perplexity,
            state.perplexity[str(state.step)],
            state.seconds,
        )
        artifacts.write_json(
            output / RESULT,
            {**result.to_dict(), "of": who, "options": asdict(options), **course(state)},
        )
    if result.improvement <= 0:
        log.warning("the perplexity did not fall: this adapter makes no better teacher")
    return result


def enable_checkpointing(model: Any) -> None:
    """Keep only each layer's input for the backward pass."""
    # transformers renames it on the way to its version 6.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.enable_input_require_grads()  # the first adapter stands inside a checkpointed layer


def course(state: State) -> dict[str, Any]:
    return {"loss_by_step": state.loss, "perplexity_by_step": state.perplexity}


def starting_point(output: Path, resume: str | Path | None) -> Path | None:
    """The checkpoint to go on from; none for a new run, which needs a new folder."""
    checkpoints = output / "checkpoints"
    if resume is None:
        if checkpoints.exists() or (output / "adapter").exists():
            raise ConfigError(
                f"{output} holds a fine-tuning already. Go on with it by --resume, or choose "
                "another folder."
            )
        return None
    if str(resume) == "auto":
        return checkpoint.newest_valid(checkpoints)
    if found := checkpoint.problems(Path(resume)):
        raise DataError(f"{resume} is not a checkpoint to resume from: {'; '.join(found)}")
    return Path(resume)


def check_same(source: Path, who: dict[str, Any]) -> None:
    saved = artifacts.read_json(source / artifacts.MANIFEST)["inputs"]
    differs = [key for key, value in who.items() if saved.get(key) != value]
    if differs:
        raise DataError(
            f"{source} is of another fine-tuning: its {', '.join(differs)} differ. Resume it with "
            "what it was begun with, or begin anew in another folder."
        )


def save_merged(
    name: str | Path, folder: Path, adapter: Path, output: Path, who: dict[str, Any]
) -> Path:
    """The teacher with the adapter added, in the precision its file has, as a folder of its own."""
    settings = artifacts.read_json(folder / "config.json")
    kind = str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
    dtype = PRECISIONS.get(kind, torch.float32)
    whole = models.load(folder, adapter=adapter, device=torch.device("cpu"), dtype=dtype)
    model: Any = whole.model
    with artifacts.atomic_directory(output) as temporary:
        with models.without_bars():
            model.save_pretrained(temporary)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                     "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
                     "chat_template.jinja"):  # fmt: skip
            if (folder / file).is_file():
                shutil.copyfile(folder / file, temporary / file)
        artifacts.write_manifest(
            temporary,
            "teacher",
            inputs={**who, "base": str(name)},
            options={"dtype": kind},
            counts={"parameters": sum(p.numel() for p in model.parameters())},
            packages=("torch", "transformers", "peft"),
        )
    return output


class Run:
    """The loop. The order of the rows is a function of seed and step, as for a student."""

    def __init__(
        self,
        loaded: LoadedModel,
        adapted: Any,
        train: Examples,
        validation: Examples,
        options: Options,
        who: dict[str, Any],
        output: Path,
    ) -> None:
        self.loaded, self.adapted, self.options, self.who = loaded, adapted, options, who
        self.rows, self.validation, self.output = train, validation, output
        self.device = loaded.head.device
        self.parameters = [p for p in adapted.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.total = options.total_steps(train.count)
        self.state = State()

    # ------------------------------------------------------------------------------ the loop

    def train(self) -> State:
        """Steps until the last; returns with the held-out rows measured at the end."""
        state, options = self.state, self.options
        stop = StopRequest(several=False)
        per_step = options.batch_rows * self.rows.length
        left = (self.total - state.step) * per_step
        with stop.listening(), progress("fine-tune", left, "tokens") as advance:
            if state.base_perplexity is None:
                with self.adapted.disable_adapter():
                    state.base_perplexity = self.perplexity()
                log.info("perplexity of the teacher as it is: %.3f", state.base_perplexity)
            while state.step < self.total:
                started = time.monotonic()
                self.step()
                state.seconds += time.monotonic() - started
                advance(per_step)
                last = state.step == self.total
                if last or state.step % options.eval_every == 0:
                    found = state.perplexity[str(state.step)] = self.perplexity()
                    log.info("step %d: perplexity %.3f", state.step, found)
                if last or stop or state.step % options.save_every == 0:
                    self.save()
                if stop and not last:
                    raise Interrupted(
                        f"Stopped after step {state.step}, which is saved. Go on with --resume."
                    )
            if str(state.step) not in state.perplexity:  # resumed with fewer steps than were done
                state.perplexity[str(state.step)] = self.perplexity()
        return state

    def step(self) -> None:
        """One update. A loss that is no number raises GuardStop before anything is changed."""
        state, options = self.state, self.options
        rate = options.rate(state.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        numbers = self.order(state.step)
        self.adapted.train()
        total = torch.zeros((), device=self.device)
        batches = [
            self.rows.rows(numbers[i : i + options.micro_batch_rows])
            for i in range(0, len(numbers), options.micro_batch_rows)
        ]
        known = sum(int((rows.targets >= 0).sum()) for rows in batches)
        for rows in batches:
            loss = self.loss(rows) / max(known, 1)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.max_grad_norm)
        value = float(total)
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            self.optimizer.zero_grad(set_to_none=True)
            event = {"event": "nan", "step": state.step, "loss": value, "norm": float(norm)}
            raise GuardStop(
                f"Step {state.step + 1}: the loss is {value}, its gradient's norm {float(norm)}. "
                "Nothing was changed by it. Resume with a lower --learning-rate.",
                self.output,
                event,
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.pending.append(value)
        if state.step % options.log_every == 0 or state.step == self.total:
            mean = state.loss[str(state.step)] = float(np.mean(state.pending))
            state.pending = []
            log.info("step %d of %d: loss %.4f, rate %.2e", state.step, self.total, mean, rate)

    def order(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step: each row once an epoch."""
        place = step * self.options.batch_rows + np.arange(self.options.batch_rows)
        epoch, offset = place // self.rows.count, place % self.rows.count
        keys = [self.options.seed * 1_000_003 + int(e) for e in epoch]
        pairs = zip(offset, keys, strict=True)
        return np.concatenate([permute(np.array([o]), self.rows.count, key) for o, key in pairs])

    def loss(self, rows: Rows) -> Tensor:
        """Sum of the cross-entropies of rows in nats."""
        inputs, targets = (torch.from_numpy(x).to(self.device) for x in rows[:2])
        starts = None if rows.starts is None else torch.from_numpy(rows.starts).to(self.device)
        hidden = self.loaded.hidden(inputs, starts)
        if self.loaded.finish is None:
            return linear_cross_entropy(hidden, self.loaded.head, targets)
        logits = self.loaded.finish((hidden @ self.loaded.head.t()).float())
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    @torch.no_grad()
    def perplexity(self) -> float:
        """exp of the mean loss of a token, over rows spread evenly over the held-out ones."""
        self.adapted.eval()
        count = min(self.options.eval_rows, self.validation.count)
        chosen = np.linspace(0, self.validation.count - 1, count).round().astype(np.int64)
        total, known = 0.0, 0
        for begin in range(0, count, self.options.micro_batch_rows):
            rows = self.validation.rows(chosen[begin : begin + self.options.micro_batch_rows])
            total += float(self.loss(rows))
            known += int((rows.targets >= 0).sum())
        mean = total / max(known, 1)
        return math.exp(mean) if mean < 700 else math.inf

    # --------------------------------------------------------------------------- what is kept

    def save(self) -> None:
        """A checkpoint of this step; older ones than the last few are removed."""
        checkpoints = self.output / "checkpoints"
        with artifacts.atomic_directory(checkpoints / f"step-{self.state.step:06d}") as temporary:
            self.write_adapter(temporary)
            torch.save(self.optimizer.state_dict(), temporary / "optimizer.pt")
            torch.save(checkpoint.random_state(), temporary / "rng.pt")
            artifacts.write_json(temporary / "state.json", asdict(self.state))
            artifacts.write_manifest(
                temporary,
                checkpoint.KIND,
                inputs=self.who,
                options={"step": self.state.step},
                counts={"parameters": sum(p.numel() for p in self.parameters)},
                packages=("torch", "transformers", "peft"),
            )
        # After going on from an old one there may be later ones: what was just written stays.
        checkpoint.prune(checkpoints, KEPT, {f"step-{self.state.step:06d}"})

    def restore(self, source: Path) -> None:
        from safetensors.torch import load_file

        peft = models.import_peft()
        peft.set_peft_model_state_dict(self.adapted, load_file(source / ADAPTER_FILE))
        self.optimizer.load_state_dict(checkpoint.unpickle_safely(source / "optimizer.pt"))
        for group in self.optimizer.param_groups:  # those given now count
            group["weight_decay"] = self.options.weight_decay
        checkpoint.restore_random_state(checkpoint.unpickle_safely(source / "rng.pt"))
        self.state = State(**artifacts.read_json(source / "state.json"))
        log.info("resumed after step %d from %s", self.state.step, source)

    def write_adapter(self, folder: Path) -> None:
        # Whether the base's embedding changed would be looked up on the hub; it did not.
        self.adapted.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form with nothing filled in

    def save_adapter(self, folder: Path) -> Path:
        with artifacts.atomic_directory(folder) as temporary:
            self.write_adapter(temporary)
            settings = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
            artifacts.write_manifest(
                temporary,
                "adapter",
                inputs=self.who,
                options={"rank": settings["r"], "lora_alpha": settings["lora_alpha"]},
                counts={"parameters": sum(p.numel() for p in self.parameters)},
                packages=("torch", "transformers", "peft"),
            )
        return folder
