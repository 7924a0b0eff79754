"""Deep supervision of a recursive model: a step is one supervision step of every row.

    rows that have halted -> new examples -> recur once -> loss, halting -> carry

Which rows halted travels to the host while the backward pass runs, so the device is not waited for.
What the rows hold is known to the host as well: with it the labelled positions are found there.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thimble.config.schema import Config
from thimble.conversations.dataset import Conversations
from thimble.errors import ConfigError, DataError
from thimble.evaluation import recursive as evaluation
from thimble.evaluation.labels import label_baselines
from thimble.generation.sampling import generate_ids
from thimble.models.recursive import RecursiveLM
from thimble.objectives import act
from thimble.objectives.act import ACT, HALT_WEIGHT, Carry, Rows
from thimble.objectives.linear_cross_entropy import IGNORE
from thimble.puzzles.loader import Split
from thimble.tokens.tokenizer import Tokenizer
from thimble.training import devices
from thimble.training.checkpoint import TrainerState
from thimble.training.compilation import should_compile
from thimble.training.distributed import Processes
from thimble.training.feeds import ConversationFeed, Feed, PuzzleFeed

SUMS = (
    *("token_loss", "token_count", "halt_loss", "rows", "finished", "finished_steps"),
    *("finished_labelled", "finished_accuracy", "finished_right", "finished_halts_right"),
    "continue_loss",
)
# What they are called in the documents.
RECORDED = {
    "token_loss": "lm_loss",
    "halt_loss": "q_halt_loss",
    "continue_loss": "q_continue_loss",
    "finished_steps": "steps",
    "finished_accuracy": "accuracy",
    "finished_right": "exact_accuracy",
    "finished_halts_right": "q_halt_accuracy",
}
EVALUATED = (
    *("perplexity", "bits_per_byte", "tokens", "token_accuracy", "accuracy", "exact_accuracy"),
    *("lm_loss", "q_halt_loss", "q_halt_accuracy", "halting_steps", "examples", "puzzle_accuracy"),
)
SHOWN = 3  # answers in a sample


class RecursionTask:
    """Conversations or puzzles -> deep supervision with halting."""

    def __init__(
        self,
        config: Config,
        data: Conversations | Split,
        model: RecursiveLM,
        device: torch.device,
        processes: Processes,
        *,
        sharded: bool,
    ) -> None:
        self.config, self.data, self.model = config, data, model
        self.device, self.processes = device, processes
        options, training = config.objective, config.training
        if sharded:
            raise ConfigError(
                "A recursive model is small, and its weights are used again and again: sharding "
                "has nothing to give. Use:\n  training.data_parallel=ddp"
            )
        self.compiled = should_compile(config, model, training.max_steps, device)
        self.objective: nn.Module = ACT(
            model, form=options.form, per_sequence=options.per_sequence, compiled=self.compiled
        )
        self.micro = training.micro_batch_size
        self.batch_size = self.micro * training.gradient_accumulation_steps
        self.mine = processes.rows(self.batch_size)
        self.feed: Feed
        self.tokenizer: Tokenizer | None = None
        if isinstance(data, Conversations):
            self.feed = ConversationFeed(data, config, self.batch_size)
            self.tokenizer, self.held_out = data.tokenizer(), "val"
            self.fingerprint: str = data.manifest["fingerprint"]
        else:
            self.feed = PuzzleFeed(data, config)
            self.held_out, self.fingerprint = "test", data.fingerprint
        # Puzzles have no other held-out split than the one their results are reported on.
        self.selects = self.held_out == "val"
        self.per_epoch, self.max_steps = self.feed.per_epoch, training.max_steps
        share = self.mine.stop - self.mine.start
        self.carry = act.empty_carry(model, share, self.feed.width(0))
        self.pieces: list[Carry] = []
        # What this process's rows hold, on the host: the lengths, and where their labels are.
        self.lengths = np.zeros(share, dtype=np.int64)
        self.weights = np.ones(share, dtype=np.float32)
        self.labels: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * share
        pinned = device.type == "cuda"
        self.halted = torch.ones(share, dtype=torch.bool, pin_memory=pinned)
        self.copied = torch.cuda.Event() if pinned else None
        self.sums = torch.zeros(len(SUMS), device=device)

    # --- the step

    def micro_batches(self, state: TrainerState) -> list[dict[str, Any]]:
        self.refill(state)
        counts = self.counts()
        config = self.model.config
        # Of all rows, whatever processes they are in, and anew at each step: nothing to be saved.
        draw = torch.Generator().manual_seed((self.config.seed * 1_000_003 + state.step) % 2**63)
        least = act.draw_least(
            self.batch_size, config.halt_max_steps, config.halt_exploration_prob, draw
        )[self.mine]
        pieces = []
        for start in range(0, len(self.lengths), self.micro):
            rows_here = slice(start, start + self.micro)
            chosen = self.labels[rows_here]
            row = np.repeat(np.arange(len(chosen)), [len(each) for each in chosen])
            where = row, np.concatenate(chosen)
            sent = devices.send(self.device, *where, least[rows_here].numpy())
            pieces.append(
                {
                    "carry": act.part(self.carry, rows_here),
                    "least": sent[2],
                    "where": (sent[0], sent[1]),
                    "counts": counts,
                }
            )
        self.pieces = []
        return pieces

    def counts(self) -> list[float]:
        """What the losses of tokens and of halting are divided by: of the step's labels, over all
        processes, so that any split into passes and processes has the same gradient."""
        each = np.array([len(labels) for labels in self.labels])
        tokens = each > 0 if self.config.objective.per_sequence else each
        both = torch.tensor([float((tokens * self.weights).sum()), float((each > 0).sum())])
        total = self.processes.add_on_host(both).tolist()
        return [count if count > 0 else 1.0 for count in total]

    def refill(self, state: TrainerState) -> None:
        """New examples for all rows that are free, over all processes in their order."""
        if self.copied is not None:
            self.copied.synchronize()
        free = self.processes.everywhere(self.halted)
        for first, end in sorted(self.config.training.skip_windows):
            if first < self.feed.place + int(free.sum()) and self.feed.place < end:
                self.feed.take(end - self.feed.place)
        numbers = self.feed.take(int(free.sum()))
        state.windows = self.feed.place
        before = int(free[: self.mine.start].sum())
        slots = np.flatnonzero(free[self.mine])
        new = numbers[before : before + len(slots)]
        if len(numbers):
            state.tokens += int(self.feed.lengths(numbers).sum())
        rows = self.hold(slots, new)
        width = self.feed.width(int(self.lengths.max(initial=0)))
        self.carry = act.resize(self.carry, width)
        if rows is not None:
            rows = self.sent(rows, width)
        taken = devices.send(self.device, slots)[0]
        self.carry = act.refill(self.carry, rows, self.model, taken)

    def sent(self, rows: Rows, width: int) -> Rows:
        """Rows on the device, padded to ``width``."""
        by = width - rows.inputs.shape[1]
        padded = replace(
            rows,
            inputs=F.pad(rows.inputs, (0, by)),
            labels=F.pad(rows.labels, (0, by), value=IGNORE),
        )
        names = [field.name for field in fields(Rows)]
        tensors = devices.send(self.device, *(getattr(padded, name).numpy() for name in names))
        return Rows(**dict(zip(names, tensors, strict=True)))

    def hold(self, slots: np.ndarray, numbers: np.ndarray) -> Rows | None:
        """Note that these examples are now in the first of these free rows; the rest are empty."""
        self.lengths[slots] = 0
        nothing = np.empty(0, dtype=np.int64)
        for slot in slots:
            self.labels[slot] = nothing
        if not len(numbers):
            return None
        rows, lengths = self.feed.rows(numbers)
        taken = slots[: len(numbers)]
        self.lengths[taken], self.weights[taken] = lengths, rows.weight.numpy()
        # The device waits for this, so all rows are looked at together.
        row, column = np.nonzero(rows.labels.numpy() != IGNORE)
        found = np.split(column, np.searchsorted(row, np.arange(1, len(numbers))))
        for slot, columns in zip(taken, found, strict=True):
            self.labels[slot] = columns
        return rows

    def loss(self, objective: nn.Module, piece: dict[str, Any]) -> Tensor:
        tokens, rows = piece["counts"]
        carry, out = objective(piece["carry"], least=piece["least"], where=piece["where"])
        self.pieces.append(carry)
        losses = ("token_loss", "token_count", "halt_loss", "continue_loss")
        figures = out.metrics | {name: getattr(out, name) for name in losses}
        self.sums += torch.stack([figures[name].detach().float() for name in SUMS])
        return out.token_loss / tokens + HALT_WEIGHT * (out.halt_loss + out.continue_loss) / rows

    def settle(self) -> None:
        self.carry = act.join(self.pieces)
        self.pieces = []
        self.halted.copy_(self.carry.halted, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    # --- how far it is

    def share(self, state: TrainerState) -> float:
        return self.feed.place / self.feed.total if self.feed.total else 0.0

    def finished(self, state: TrainerState) -> bool:
        if state.step >= self.max_steps:
            return True
        if self.feed.total is None or self.feed.place < self.feed.total:
            return False
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.processes.everywhere(self.halted).all())

    def expected_steps(self, state: TrainerState) -> int:
        if not self.feed.total or not state.step or not self.feed.place:
            return self.max_steps
        return min(self.max_steps, math.ceil(state.step * self.feed.total / self.feed.place))

    # --- what is told

    def record(self, learning_rate: float) -> dict[str, float]:
        """The documents' figures: of the tokens and rows of all steps since the last record, and of
        the examples that halted in them."""
        total = dict(zip(SUMS, self.processes.add(self.sums.clone()).tolist(), strict=True))
        self.sums.zero_()

        def mean(name: str, over: str) -> dict[str, float]:
            return {name: total[name] / total[over]} if total[over] else {}

        found = {
            **mean("token_loss", "token_count"),
            **mean("halt_loss", "rows"),
            **(mean("continue_loss", "rows") if self.model.config.q_continue else {}),
            **mean("finished_steps", "finished"),
            **mean("finished_accuracy", "finished_labelled"),
            **mean("finished_right", "finished_labelled"),
            **mean("finished_halts_right", "finished_labelled"),
        }
        return {RECORDED[name]: value for name, value in found.items()} | {
            "examples": self.feed.place,
            "lr": learning_rate,
            "num_params": self.model.num_parameters(),
        }

    def evaluate(self) -> dict[str, Any]:
        config = self.config
        measure: dict[str, Any] = {
            "form": config.objective.form,
            "max_examples": config.evaluation.max_examples,
            "batch_size": self.micro,
            "processes": self.processes,
        }
        if isinstance(self.data, Conversations):
            if not len(self.data.split(self.held_out)):
                return {}
            found = evaluation.evaluate_conversations(
                self.model, self.data, self.held_out, **measure
            )
        else:
            split = Split(config.data.folder, self.held_out)
            found = evaluation.evaluate_puzzles(self.model, split, **measure)
        record = {f"val_{name}": found[name] for name in EVALUATED if name in found}
        return {**record, "val_loss": found["nll"], "val_by_step": found["by_step"]}

    def samples(self) -> list[str]:
        if not self.processes.main:
            return []
        if not isinstance(self.data, Conversations):
            return []
        chosen = evaluation.choose(self.data.split(self.held_out), SHOWN)
        return [self.answer(int(number)) for number in chosen]

    def answer(self, number: int) -> str:
        """A held-out conversation: its prompt, the model's answer, and the one that was given."""
        assert isinstance(self.data, Conversations)
        assert self.tokenizer is not None
        ids, _ = self.data.example(number)
        prompt = int(self.data.examples["prompt"][number])
        room = self.model.config.max_position_embeddings - prompt
        made = generate_ids(
            self.model,
            ids[:prompt].tolist(),
            max_tokens=max(min(self.config.evaluation.sample_tokens, room), 1),
            temperature=0,
            top_k=0,
            top_p=1.0,
            seed=self.config.seed,
            stop=frozenset({self.data.end_id}),
        )
        asked, said, given = (
            self.tokenizer.decode(list(part)) for part in (ids[:prompt], made, ids[prompt:-1])
        )
        return f"{asked}{said}\n(given: {given})"

    def baselines(self) -> dict[str, float]:
        """Bits per byte of the held-out answers by models that only count."""
        if not isinstance(self.data, Conversations):
            return {}
        if not self.data.examples["labelled"][self.data.split(self.held_out)].sum():
            return {}
        found = label_baselines(self.data, self.held_out)
        names = {name: f"{name}_bits_per_byte" for name in ("unigram", "bigram")}
        return {name: found[key] for name, key in names.items() if key in found}

    # --- checkpoints

    def cursor(self, state: TrainerState) -> dict[str, Any]:
        return {
            "tokens": self.fingerprint,
            "seed": self.config.seed,
            "sequence_length": self.config.training.sequence_length,
            **self.feed.cursor(),
            "examples_per_epoch": self.per_epoch,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The carry of all processes, one after the other, as wide as the widest."""
        widest = self.processes.most(self.carry.rows.inputs.shape[1])
        carry = act.resize(self.carry, widest)
        own = {f"rows.{f.name}": getattr(carry.rows, f.name) for f in fields(Rows)}
        own |= {f"latents.{index}": latent for index, latent in enumerate(carry.latents)}
        own |= {"steps": carry.steps, "halted": carry.halted.to(torch.uint8)}
        found = {name: self.processes.joined(tensor) for name, tensor in own.items()}
        # Of what no record has told yet, the sums of all are kept by one.
        return {**found, "sums": self.processes.add(self.sums.clone())}

    def resume(self, cursor: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.feed.seek(cursor)
        mine = {name: value[self.mine] for name, value in tensors.items() if name != "sums"}
        if len(tensors["steps"]) != self.batch_size:
            raise DataError(
                f"The checkpoint was in the middle of {len(tensors['steps'])} examples, and a step "
                f"now takes {self.batch_size}. Go on with as many:\n"
                f"  global_batch_size={len(tensors['steps'])}"
            )
        mine = {name: value.to(self.device) for name, value in mine.items()}
        rows = Rows(**{f.name: mine[f"rows.{f.name}"] for f in fields(Rows)})
        latents = tuple(mine[f"latents.{index}"] for index in range(len(self.carry.latents)))
        self.carry = Carry(rows, latents, mine["steps"], mine["halted"].bool())
        self.halted.copy_(self.carry.halted)
        self.sums.zero_()
        if self.processes.main:
            self.sums[: len(tensors["sums"])] = tensors["sums"].to(self.device)
        labels, inputs = (rows.labels.cpu().numpy(), tensors["rows.inputs"])
        for row in range(len(labels)):
            self.labels[row] = np.flatnonzero(labels[row] != IGNORE)
            self.lengths[row] = inputs.shape[1]  # until another example comes into the row
            self.weights[row] = float(rows.weight[row])

    def documents(self) -> dict[str, Any]:
        form = self.config.objective.form
        if isinstance(self.data, Conversations):
            options = self.data.manifest["options"]
            return {
                "conversation.json": {
                    "template": options["template"],
                    "system_message": options["system_message"],
                    "end_id": self.data.end_id,
                    "pad_id": self.data.pad_id,
                    "seq_len": self.data.seq_len,
                    "form": form,
                }
            }
        metadata = self.data.metadata
        return {
            "puzzle.json": {
                "kind": self.data.kind,
                "seq_len": metadata.seq_len,
                "vocab_size": metadata.vocab_size,
                "pad_id": metadata.pad_id,
                "num_puzzle_identifiers": metadata.num_puzzle_identifiers,
                "form": form,
            }
        }
