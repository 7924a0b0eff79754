"""Next-token training on windows of a token stream."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from thimble.config.schema import Config
from thimble.evaluation.perplexity import evaluate_split
from thimble.generation.sampling import generate_ids
from thimble.models.causal_lm import CausalLM
from thimble.objectives.linear_cross_entropy import token_losses
from thimble.objectives.next_token import NextToken
from thimble.tokens.loader import Windows
from thimble.tokens.shards import TokenSplit
from thimble.tokens.tokenizer import load_tokenizer
from thimble.training import devices
from thimble.training.checkpoint import TrainerState
from thimble.training.compilation import should_compile
from thimble.training.distributed import Processes
from thimble.training.plan import total_steps


class NextTokenTask:
    """Windows in a keyed order -> cross-entropy of the next token."""

    selects = True

    def __init__(
        self,
        config: Config,
        data: TokenSplit,
        model: CausalLM,
        device: torch.device,
        processes: Processes,
        *,
        sharded: bool,
    ) -> None:
        self.config, self.model, self.device, self.processes = config, model, device, processes
        self.sharded = sharded
        self.windows = Windows(data.tokens, config.training.sequence_length, config.seed)
        training = config.training
        self.micro = training.micro_batch_size
        self.batch_size = self.micro * training.gradient_accumulation_steps
        self.rows = processes.rows(self.batch_size)
        self.per_epoch = self.windows.count
        self.max_steps = total_steps(config, self.per_epoch)
        self.compiled = should_compile(config, model, self.max_steps, device)
        self.objective: nn.Module = NextToken(model, compiled=self.compiled and not sharded)
        self.tokenizer = load_tokenizer(config.data.folder)
        self.fingerprint: str = data.manifest["fingerprint"]

    def micro_batches(self, state: TrainerState) -> list[tuple[Tensor, Tensor, float]]:
        for first, end in sorted(self.config.training.skip_windows):
            if first < state.windows + self.batch_size and state.windows < end:
                state.windows = end
        inputs, targets = self.windows.batch(state.windows, self.batch_size)
        # The mean over all targets of the step: whatever way it is split, the same gradient.
        count = int((targets != -100).sum())
        state.windows += self.batch_size
        state.tokens += count
        mine = devices.send(self.device, inputs[self.rows], targets[self.rows])
        pieces = zip(*(tensor.split(self.micro) for tensor in mine), strict=True)
        return [(*piece, 1 / max(count, 1)) for piece in pieces]

    def loss(self, objective: nn.Module, piece: tuple[Tensor, Tensor, float]) -> Tensor:
        inputs, targets, scale = piece
        return objective(inputs, targets) * scale

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
        config = self.config
        result = evaluate_split(
            functools.partial(self.processes.by_rows, self.token_losses),
            TokenSplit(config.data.folder, "val"),
            config.training.sequence_length,
            config.training.micro_batch_size * self.processes.count,
            config.evaluation.max_tokens,
            device=self.device,
        )
        return {
            "val_loss": result["loss"],
            "val_perplexity": result["perplexity"],
            "val_bits_per_byte": result["bits_per_byte"],
            "val_tokens": result["tokens"],
        }

    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return token_losses(self.model.hidden(inputs), self.model.head.weight, targets)

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
