"""What a run will do, before it does it: parameters, FLOPs, tokens, epochs, and what collides."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from thimble.config.schema import Config, ModelConfig
from thimble.errors import ConfigError

if TYPE_CHECKING:
    from thimble.tokens.shards import TokenSplit

# From here on repeated text teaches little (Muennighoff et al. 2023, arXiv:2305.16264).
USEFUL_EPOCHS = 4


def total_steps(config: Config, windows: int) -> int:
    """Updates of the whole run: ``max_steps``, or fewer where ``max_epochs`` end first."""
    training = config.training
    if training.max_epochs is None:
        return training.max_steps
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    return max(1, min(training.max_steps, math.ceil(training.max_epochs * windows / batch)))


def training_tokens(config: Config) -> TokenSplit:
    """The training split of a configuration.

    Raises DataError when it is not there or not whole, ConfigError when the model's vocabulary is
    too small for it.
    """
    from thimble.tokens.shards import TokenSplit

    data = TokenSplit(config.data.path, "train")
    if data.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{config.data.path} has {data.vocab_size:,} token ids, the model has "
            f"{config.model.vocab_size:,}. Use:\n  model.vocab_size={data.vocab_size}"
        )
    return data


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs per trained token: 6 per weight that multiplies, and attention.

    The head counts, the embedding look-up does not; attention is counted causally, half of
    12 x layers x heads x head_dim x length (PaLM, arXiv:2204.02311, appendix B). Retention is
    counted alike within its chunks; beyond them a position is read into the memory and out of it.
    """
    weights = config.num_parameters
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    if config.mixer == "retention":
        keys, values = config.head_dim, config.value_width
        chunk = min(config.retention_chunk, sequence_length)
        each = 3.0 * chunk * (keys + values) + 12.0 * keys * values
        return 6.0 * weights + config.num_hidden_layers * config.num_attention_heads * each
    width = config.num_attention_heads * config.head_dim
    return 6.0 * weights + 6.0 * config.num_hidden_layers * width * sequence_length


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


def plan(config: Config) -> Plan:
    """The plan of a run, from its configuration and its tokens; see ``training_tokens``."""
    from thimble.tokens.loader import Windows

    data = training_tokens(config)
    training, optim = config.training, config.optim
    windows = Windows(data.tokens, training.sequence_length, config.seed).count
    steps = total_steps(config, windows)
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    tokens = steps * batch * training.sequence_length
    epochs = steps * batch / windows
    parameters = config.model.num_parameters
    per_token = flops_per_token(config.model, training.sequence_length)

    warnings = []
    if steps < training.max_steps:
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
    if epochs > USEFUL_EPOCHS:
        enough = max(1, int(USEFUL_EPOCHS * windows / batch))
        warnings.append(
            f"{epochs:.1f} passes over {len(data.tokens):,} tokens: beyond about {USEFUL_EPOCHS} "
            f"repetition teaches little. More text, or training.max_steps={enough}."
        )
    if len(data.tokens) < parameters / 10:
        warnings.append(
            f"{len(data.tokens):,} training tokens for {parameters:,} parameters is very little: "
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
        tokens_per_step=batch * training.sequence_length,
        tokens=tokens,
        tokens_available=len(data.tokens),
        epochs=epochs,
        tokens_per_parameter=tokens / parameters,
        flops_per_token=per_token,
        flops=per_token * tokens,
        warnings=warnings,
    )
