"""What a run will do, before it does it: parameters, FLOPs, tokens, epochs, and what collides."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from thimble.config.schema import Config, ModelConfig
from thimble.training.data import open_data

# From here on repeated text teaches little (Muennighoff et al. 2023, arXiv:2305.16264).
USEFUL_EPOCHS = 4


def total_steps(config: Config, windows: int) -> int:
    """Updates of the whole run: ``max_steps``, or fewer where ``max_epochs`` end first."""
    training = config.training
    if training.max_epochs is None:
        return training.max_steps
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    return max(1, min(training.max_steps, math.ceil(training.max_epochs * windows / batch)))


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs per trained token: 6 per weight that multiplies, and attention.

    The head counts, the embedding look-up does not; attention is counted causally, half of
    12 x layers x heads x head_dim x length (PaLM, arXiv:2204.02311, appendix B). Retention is
    counted alike within its chunks; beyond them a position is read into the memory and out of it.
    Of a recursive model these are the FLOPs of one supervision step: 2 per weight in every call of
    a stack, and 4 more in those that gradients go through; its head is counted as if every token
    were labelled.
    """
    head = 6.0 * config.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    seen = flops_between_positions(config, sequence_length)
    if config.schedule == "recursive":
        mixer = 3 * config.mlp_mixer_width * config.hidden_size  # over positions, for each channel
        if config.mixer == "retention":
            mixer = heads * config.hidden_size * (2 * config.head_dim + 3 * config.value_width)
        elif config.mixer == "attention":
            kv_heads = config.num_key_value_heads
            mixer = 2 * config.hidden_size * config.head_dim * (heads + kv_heads)
        block = 2.0 * (mixer + 3 * config.hidden_size * config.intermediate_size) + seen
        return block * (config.blocks_per_step + 2 * config.blocks_with_gradients) + head
    weights = config.num_parameters
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    return 6.0 * weights + 3.0 * config.num_hidden_layers * seen


def flops_between_positions(config: ModelConfig, sequence_length: int) -> float:
    """Forward FLOPs of a position in one block for what it takes from others, weights aside."""
    heads, keys, values = config.num_attention_heads, config.head_dim, config.value_width
    if config.mixer == "mlp":
        return 0.0  # all of it is weights
    if config.mixer == "retention":
        chunk = min(config.retention_chunk, sequence_length)
        return heads * (chunk * (keys + values) + 4.0 * keys * values)
    return heads * keys * sequence_length * (2.0 if config.causal else 4.0)


@dataclass(frozen=True)
class Plan:
    recipe: str
    parameters: int
    steps: int
    tokens_per_step: int
    tokens: int
    tokens_available: int
    epochs: float
    tokens_per_parameter: float
    flops_per_token: float
    flops: float
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Amount:
    """What a run goes through: ``examples`` an epoch of ``length`` tokens on average, ``steps``
    updates at most, ``seen`` examples in all of them, each as often as it is thought about."""

    examples: int
    length: float
    steps: int
    seen: int
    epochs: float


def amount(config: Config) -> Amount:
    """Of a configuration whose data are there; see ``data.open_data`` for what is raised.

    Of deep supervision the most it can be: that no example halts before its last step.
    """
    data = open_data(config)
    training = config.training
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    if config.objective.name == "next_token":
        from thimble.tokens.loader import Windows

        windows = Windows(data.tokens, training.sequence_length, config.seed).count
        steps = total_steps(config, windows)
        return Amount(
            windows, training.sequence_length, steps, steps * batch, steps * batch / windows
        )
    from thimble.conversations.dataset import Conversations

    if isinstance(data, Conversations):
        lengths = data.examples["length"][data.split("train")] - 1
        examples, length = len(lengths), float(lengths.mean()) if len(lengths) else 0.0
    else:
        examples, length = len(data.order(config.seed, 0)), float(data.metadata.seq_len)
    thought = config.model.halt_max_steps
    steps = training.max_steps
    if training.max_epochs is not None:
        most = math.ceil(training.max_epochs * examples * thought / batch) + thought
        steps = min(steps, most)
    seen = steps * batch
    if training.max_epochs is not None:
        seen = min(seen, round(training.max_epochs * examples) * thought)
    return Amount(examples, length, steps, seen, seen / thought / max(examples, 1))


def plan(config: Config) -> Plan:
    """The plan of a run, from its configuration and its data; see ``amount``."""
    training, optim = config.training, config.optim
    run = amount(config)
    steps, epochs = run.steps, run.epochs
    recursive = config.objective.name == "act"
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    tokens = round(run.seen * run.length)
    available = round(run.examples * run.length) if recursive else len(open_data(config).tokens)
    parameters = config.model.num_parameters
    per_token = flops_per_token(config.model, training.sequence_length)

    warnings = []
    thought = config.model.halt_max_steps
    if recursive and thought > 1:
        warnings.append(
            f"Counted as if every example were thought about for all {thought} supervision steps; "
            "a halting head that learns makes it less."
        )
    if steps < training.max_steps and not recursive:
        warnings.append(
            f"The data give {steps:,} steps in {training.max_epochs:g} epochs, not the "
            f"{training.max_steps:,} of training.max_steps: the run ends there."
        )
    if optim.warmup_steps > steps / 5:
        share = f"{100 * optim.warmup_steps / steps:.0f} %"
        warnings.append(
            f"The warm-up of {optim.warmup_steps:,} steps is {share} of the run. "
            f"Try optim.warmup_steps={max(1, steps // 10)}."
        )
    if epochs > USEFUL_EPOCHS and not recursive:
        enough = max(1, int(USEFUL_EPOCHS * run.examples / batch))
        warnings.append(
            f"{epochs:.1f} passes over {available:,} tokens: beyond about {USEFUL_EPOCHS} "
            f"repetition teaches little. More text, or training.max_steps={enough}."
        )
    if available < parameters / 10 and not recursive:
        warnings.append(
            f"{available:,} training tokens for {parameters:,} parameters is very little: "
            "expect memorised phrases, not language. A few million tokens make a difference."
        )
    for key in ("eval_every", "save_every"):
        if getattr(training, key) > steps:
            warnings.append(
                f"training.{key}={getattr(training, key)} is beyond the {steps:,} steps of the "
                "run; it happens once, at the end."
            )
    if config.guards.plateau_steps >= steps:
        warnings.append(
            f"guards.plateau_steps={config.guards.plateau_steps} is no shorter than the run, so "
            "that guard cannot act."
        )
    return Plan(
        recipe=config.recipe,
        parameters=parameters,
        steps=steps,
        tokens_per_step=round(batch * run.length),
        tokens=tokens,
        tokens_available=available,
        epochs=epochs,
        tokens_per_parameter=tokens / parameters,
        flops_per_token=per_token,
        flops=per_token * tokens,
        warnings=warnings,
    )
