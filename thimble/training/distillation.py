"""Distillation: rows of tokens, and what a teacher says about each of their positions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thimble.config.schema import Config
from thimble.console import log
from thimble.evaluation import agreement
from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM
from thimble.objectives.distillation import Distillation, blend, temperatures
from thimble.teachers import (
    Asked,
    Examples,
    PackedExamples,
    Teacher,
    held_out,
    named,
    open_examples,
)
from thimble.teachers.cache import CachedTeacher, RecordingTeacher
from thimble.teachers.direct import DirectTeacher
from thimble.teachers.held_out import HeldOutRows
from thimble.teachers.models import find, identity
from thimble.tokens.packed import PackedChunks
from thimble.tokens.shards import TokenSplit
from thimble.training.checkpoint import TrainerState
from thimble.training.distributed import Processes
from thimble.training.language import NextTokenTask, Piece, measure_held_out


class DistillTask(NextTokenTask):
    """Windows in a keyed order -> cross-entropy of the next token and divergence from a teacher.

    The teacher is no part of the objective, so none of its parameters is trained or saved.
    """

    def __init__(
        self,
        config: Config,
        data: TokenSplit | PackedChunks,
        model: CausalLM | RecursiveLM,
        device: torch.device,
        processes: Processes,
        *,
        sharded: bool,
    ) -> None:
        super().__init__(config, data, model, device, processes, sharded=sharded)
        length = config.training.sequence_length
        self.examples = open_examples(config.data.folder, "train", length)
        self.teacher = open_teacher(config, self.examples, device)
        self.blend = blend(config.objective, 0, self.max_steps)
        # Cross-entropy, divergence, positions: of the steps since the last record.
        self.sums = torch.zeros(3, device=device)

    def make_objective(self, model: CausalLM | RecursiveLM, *, compiled: bool) -> nn.Module:
        return Distillation(model, compiled=compiled)

    def micro_batches(self, state: TrainerState) -> list[Piece]:
        self.blend = blend(self.config.objective, state.step, self.max_steps)
        return super().micro_batches(state)

    def loss(self, objective: nn.Module, piece: Piece) -> Tensor:
        apart = piece.starts if self.windows.apart else None
        said = self.teacher.targets(piece.numbers, piece.inputs, apart)
        starts = self.seen(piece.starts)
        found = objective(piece.inputs, piece.targets, starts, said, self.blend)
        count = (piece.targets != -100).sum()
        self.sums += torch.stack([found.cross_entropy, found.divergence, count]).float()
        return found.loss * piece.scale

    def record(self, learning_rate: float) -> dict[str, float]:
        """Nats a position; ``loss`` is alpha x ce + (1 - alpha) x temperature^2 x kl."""
        ce, kl, count = self.processes.add(self.sums.clone()).tolist()
        self.sums.zero_()
        alpha, temperature, reverse = self.blend
        return {
            "ce": ce / max(count, 1),
            "kl": kl / max(count, 1),
            "alpha": alpha,
            "temperature": temperature,
            "reverse": float(reverse),
        }

    def evaluate(self) -> dict[str, Any]:
        """Perplexity as of every language model, likeness to the teacher, calibration."""
        teacher = self.evaluation_teacher
        found = self.measured(
            functools.partial(self.position_scores, teacher),
            agreement.names(teacher=teacher is not None),
        )
        likeness = {f"val_{n}": found[n] for n in agreement.TEACHER_NAMES if n in found}
        return {
            **self.figures(found),
            **likeness,
            "val_calibration_error": agreement.calibration_error(found),
        }

    @functools.cached_property
    def evaluation_teacher(self) -> Teacher | None:
        """Who is asked about held-out text, at temperature 1: the teacher itself. A cache, which is
        of the training text alone, keeps what its teacher says about held-out text, too, who is
        loaded once for that; None where nobody says who it is."""
        teacher, options = self.teacher, self.config.teacher
        if isinstance(teacher, RecordingTeacher):
            teacher = teacher.teacher
        if isinstance(teacher, DirectTeacher):
            asked = Asked(min(options.topk, len(teacher.loaded.head)))
            return DirectTeacher(teacher.loaded, asked, len(teacher.loaded.head), teacher.identity)
        if not isinstance(teacher, CachedTeacher):
            return teacher  # a served one, which knows temperature 1 only
        assert options.cache is not None
        rows = held_out_rows(self.config, self.examples)
        asked = within(Asked(options.topk), rows.vocab_size)
        found = held_out.find(options.cache, rows, asked, teacher.identity)
        # Nobody writes before all have looked, and nobody reads before it is written.
        if self.processes.any(found is None)[0] and options.path is not None:
            if self.processes.main:
                teacher = answering(self.config, self.examples, asked, self.device)
                held_out.keep(options.cache, rows, teacher)
            self.processes.any(False)  # the others wait
            found = held_out.find(options.cache, rows, asked, self.teacher.identity)
        return found

    def position_scores(
        self, teacher: Teacher | None, inputs: Tensor, targets: Tensor, starts: Tensor
    ) -> Tensor:
        said: Any = None
        if teacher is not None:
            apart = starts if self.windows.apart else None
            said = teacher.targets(range(len(inputs)), inputs, apart)
        hidden = self.model.hidden(inputs, starts_bt=self.seen(starts))
        return agreement.position_scores(hidden, self.model.head.weight, targets, said)

    # --- checkpoints

    def cursor(self, state: TrainerState) -> dict[str, Any]:
        return {**super().cursor(state), "teacher": self.teacher.identity}

    def tensors(self) -> dict[str, Tensor]:
        # Of what no record has told yet, the sums of all are kept by one.
        return {"sums": self.processes.add(self.sums.clone())}

    def resume(self, cursor: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().resume(cursor, tensors)
        if cursor.get("teacher", self.teacher.identity) != self.teacher.identity:
            log.warning("from here on the teacher is another one than before")
        self.sums.zero_()
        if "sums" in tensors and self.processes.main:  # not after training without a teacher
            self.sums.copy_(tensors["sums"])

    def documents(self) -> dict[str, Any]:
        """Whom the student learned from."""
        teacher = self.teacher
        named = self.config.teacher.model_dump(mode="json")
        return {
            "teacher.json": {
                **named,
                "identity": teacher.identity,
                "asked": teacher.asked.to_dict(),
                "data": self.examples.identity,
            }
        }


def asked_of(config: Config) -> Asked:
    """What a run asks its teacher for."""
    teacher = config.teacher
    # In the order of the levels, each once.
    levels = dict.fromkeys(temperatures(config.objective))
    k = teacher.topk if teacher.sampled else min(teacher.topk, config.model.vocab_size)
    return Asked(k, tuple(levels), teacher.sampled, config.seed)


def open_teacher(config: Config, examples: Examples, device: torch.device) -> Teacher:
    """The teacher of a run; see ``thimble.teachers`` for what is raised."""
    options, asked = config.teacher, within(asked_of(config), examples.vocab_size)
    if options.mode == "cached":
        assert options.cache is not None
        wanted = None
        if options.path is not None:
            adapter = None if options.adapter is None else Path(options.adapter)
            wanted = identity(find(options.path), adapter)
        return CachedTeacher(options.cache, examples, asked, wanted)
    teacher = answering(config, examples, asked, device)
    if options.cache_logits:
        assert options.cache is not None
        return RecordingTeacher(teacher, options.cache, examples)
    return teacher


def held_out_rows(config: Config, like: Examples) -> HeldOutRows:
    """What the evaluations of a run read: found by one that only writes down."""
    rows = HeldOutRows(like)
    apart = isinstance(like, PackedExamples)

    def note(inputs: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        rows.note(inputs, targets, starts if apart else None)
        return torch.zeros(targets.shape)

    measure_held_out(config, note, config.training.micro_batch_size, torch.device("cpu"), [])
    return rows


def answering(config: Config, examples: Examples, asked: Asked, device: torch.device) -> Teacher:
    """The one of a run that can be asked anew: its server, or what its ``teacher.path`` names."""
    options = config.teacher
    served = options.mode == "served"
    name = options.url if served else options.path
    assert name is not None
    return named.open_teacher(
        name,
        examples,
        asked,
        adapter=None if served else options.adapter,
        served_model=options.path if served else None,
        device=device,
        precision=config.precision,
    )


def within(asked: Asked, vocabulary: int) -> Asked:
    """No more of the likeliest tokens than there are."""
    if asked.sampled or asked.k <= vocabulary:
        return asked
    return Asked(vocabulary, asked.temperatures, seed=asked.seed)
