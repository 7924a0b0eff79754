"""Next-token training on windows of a token stream, or on packed chunks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thimble.config.schema import Config
from thimble.errors import ConfigError
from thimble.evaluation.perplexity import evaluate_split
from thimble.generation.sampling import generate_ids
from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM
from thimble.objectives.linear_cross_entropy import token_losses
from thimble.objectives.next_token import NextToken
from thimble.tokens.packed import PackedChunks
from thimble.tokens.shards import TokenSplit
from thimble.tokens.tokenizer import load_tokenizer
from thimble.training import devices
from thimble.training.checkpoint import TrainerState
from thimble.training.compilation import should_compile
from thimble.training.data import open_data
from thimble.training.distributed import Processes
from thimble.training.plan import total_steps
from thimble.training.rows import Measure, evaluate_chunks, open_rows


class Piece(NamedTuple):
    """A pass: inputs, targets and starts of documents [B, T], the rows' numbers [B], what the sum
    is scaled by."""

    inputs: Tensor
    targets: Tensor
    starts: Tensor
    numbers: list[int]
    scale: float


class NextTokenTask:
    """Windows in a keyed order -> cross-entropy of the next token."""

    selects = True

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
        self.config, self.model, self.device, self.processes = config, model, device, processes
        self.sharded = sharded
        self.windows = open_rows(data, config.training.sequence_length, config.seed)
        training = config.training
        self.micro = training.micro_batch_size
        self.batch_size = self.micro * training.gradient_accumulation_steps
        self.rows = processes.rows(self.batch_size)
        self.per_epoch = self.windows.count
        self.max_steps = total_steps(config, self.per_epoch)
        self.compiled = should_compile(config, model, self.max_steps, device)
        if isinstance(model, RecursiveLM):
            if sharded:
                raise ConfigError(
                    "A recursive model is small, and its weights are used again and again: "
                    "sharding has nothing to give. Use:\n  training.data_parallel=ddp"
                )
            model.q_head.requires_grad_(False)  # nothing here says when to halt
        self.objective: nn.Module = self.make_objective(
            model, compiled=self.compiled and not sharded
        )
        self.tokenizer = load_tokenizer(config.data.folder)
        self.end_id: int = self.windows.end_id
        self.fingerprint: str = data.manifest["fingerprint"]

    def make_objective(self, model: CausalLM | RecursiveLM, *, compiled: bool) -> nn.Module:
        return NextToken(model, compiled=compiled)

    def micro_batches(self, state: TrainerState) -> list[Piece]:
        for first, end in sorted(self.config.training.skip_windows):
            if first < state.windows + self.batch_size and state.windows < end:
                state.windows = end
        inputs, targets, starts, numbers = self.windows.batch(state.windows, self.batch_size)
        # The mean over all targets of the step: whatever way it is split, the same gradient.
        count = int((targets != -100).sum())
        state.windows += self.batch_size
        state.tokens += count
        mine = devices.send(self.device, *(x[self.rows] for x in (inputs, targets, starts)))
        pieces = zip(*(tensor.split(self.micro) for tensor in mine), strict=True)
        wanted = numbers[self.rows].tolist()
        return [
            Piece(a, b, c, wanted[at * self.micro : (at + 1) * self.micro], 1 / max(count, 1))
            for at, (a, b, c) in enumerate(pieces)
        ]

    def loss(self, objective: nn.Module, piece: Piece) -> Tensor:
        return objective(piece.inputs, piece.targets, self.seen(piece.starts)) * piece.scale

    def seen(self, starts: Tensor) -> Tensor | None:
        """Where documents begin, for a model that keeps them apart: retention always, attention
        those of packed chunks, where a teacher does so, too."""
        return starts if self.model.config.mixer == "retention" or self.windows.apart else None

    def settle(self) -> None:
        pass

    def share(self, state: TrainerState) -> float:
        return 0.0

    def finished(self, state: TrainerState) -> bool:
        return state.step >= self.max_steps

    def expected_steps(self, state: TrainerState) -> int:
        return self.max_steps

    def record(self, learning_rate: float) -> dict[str, float]:
        return {}

    def evaluate(self) -> dict[str, Any]:
        return self.figures(self.measured(self.token_losses))

    def measured(self, measure: Measure, beside: Sequence[str] = ()) -> dict[str, Any]:
        """Of the validation split, what ``measure`` gives of each position; see
        ``perplexity.evaluate_split``."""
        by_rows = functools.partial(self.processes.by_rows, measure)
        rows = self.config.training.micro_batch_size * self.processes.count
        return measure_held_out(self.config, by_rows, rows, self.device, list(beside))

    def figures(self, result: dict[str, Any]) -> dict[str, Any]:
        # Of packed chunks nobody knows the bytes.
        names = ("loss", "perplexity", "bits_per_byte", "tokens")
        return {f"val_{name}": result[name] for name in names if name in result}

    def token_losses(self, inputs: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        hidden = self.model.hidden(inputs, starts_bt=self.seen(starts))
        return token_losses(hidden, self.model.head.weight, targets)

    def samples(self) -> list[str]:
        # A sharded model needs all of its processes.
        if not (self.processes.main or self.sharded):
            return []
        return [self.sample(prompt) for prompt in self.config.evaluation.prompts]

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

        if self.windows.apart:
            return {}
        return known_rungs(self.config.data.folder, "val")

    def cursor(self, state: TrainerState) -> dict[str, Any]:
        return {
            "tokens": self.fingerprint,
            "seed": self.config.seed,
            "sequence_length": self.config.training.sequence_length,
            "windows_seen": state.windows,
            "windows_per_epoch": self.per_epoch,
        }

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def resume(self, cursor: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        pass  # the place is in the state, and a window follows from it

    def documents(self) -> dict[str, Any]:
        return {}


def measure_held_out(
    config: Config, measure: Measure, rows: int, device: torch.device, beside: list[str]
) -> dict[str, Any]:
    """The validation split of a run, ``rows`` at a time; see ``perplexity.evaluate_split``."""
    most, held_out = config.evaluation.max_tokens, open_data(config, "val")
    if isinstance(held_out, PackedChunks):
        return evaluate_chunks(measure, held_out, rows, most, device, beside)
    return evaluate_split(
        lambda inputs, targets: measure(inputs, targets, inputs == held_out.eot_id),
        held_out,
        config.training.sequence_length,
        rows,
        most,
        device=device,
        beside=beside,
    )
