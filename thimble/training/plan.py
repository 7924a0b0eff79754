"""What a run will do, before it does it: parameters, FLOPs, tokens, epochs, and what collides."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thimble.config.schema import Config, ModelConfig
from thimble.conversations import sources
from thimble.training.data import open_data
from thimble.training.teacher_costs import TeacherCosts, costs

# Conversations of data sets that are not here: SlimOrca's as its documents count them, OpenOrca's
# as its page on the hub does (1 million of GPT-4, 3.2 million of GPT-3.5).
KNOWN_EXAMPLES = {"slimorca": 517_982, "openorca": 4_200_000}
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
    a stack, and 4 more in those that gradients go through; what positions before the tokens take is
    shared out among these, and its head is counted as if every token were labelled.
    """
    head = 6.0 * config.vocab_size * config.hidden_size
    heads, width = config.num_attention_heads, config.num_attention_heads * config.head_dim
    if config.schedule == "recursive":
        positions = sequence_length + config.num_positions - config.max_position_embeddings
        mixer = 3 * config.mlp_mixer_width * config.hidden_size  # over positions, for each channel
        if config.mixer == "retention":
            mixer = heads * config.hidden_size * (2 * config.head_dim + 3 * config.value_width)
        elif config.mixer == "attention":
            kv_width = config.num_key_value_heads * config.head_dim
            gates = width if config.attention_gate else 0
            mixer = config.hidden_size * (2 * (width + kv_width) + gates)
        block = 2.0 * (mixer + 3 * config.hidden_size * config.intermediate_size)
        block += flops_between_positions(config, positions)
        # HRM's value of going on takes another step, without gradients.
        forward = config.blocks_per_step * (2 if config.q_continue else 1)
        blocks = forward + 2 * config.blocks_with_gradients
        return block * blocks * positions / sequence_length + head
    weights = config.num_parameters
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    between = flops_between_positions(config, sequence_length)
    return 6.0 * weights + 3.0 * config.num_hidden_layers * between


def flops_between_positions(config: ModelConfig, positions: int) -> float:
    """Forward FLOPs of a position in one block for what it takes from others, weights aside."""
    heads, keys, values = config.num_attention_heads, config.head_dim, config.value_width
    if config.mixer == "mlp":
        return 0.0  # all of it is weights
    if config.mixer == "retention":
        chunk = min(config.retention_chunk, positions)
        return heads * (chunk * (keys + values) + 4.0 * keys * values)
    return heads * keys * positions * (2.0 if config.causal else 4.0)


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
    # What is left of tokens, FLOPs and time when every example halts after one supervision step; 1
    # where there is nothing to halt, or steps are what ends the run.
    halting_at_once: float
    examples: int  # of an epoch: conversations, puzzles, windows
    teacher: TeacherCosts | None  # counted in ``flops_per_token``
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Amount:
    """What a run goes through: ``examples`` an epoch of ``length`` tokens on average, ``steps``
    updates at most, ``seen`` examples in all of them, each as often as it is thought about.
    ``ended_by_examples``: when all of them are done, before those steps. ``tokens`` there are, of
    a text."""

    examples: int
    length: float
    steps: int
    seen: int
    epochs: float
    ended_by_examples: bool = False
    tokens: int = 0


def is_away(config: Config) -> bool:
    """Whether a run would have to fetch its conversations first, and how many is known anyway."""
    known = _hub_name(config)
    if known is None:
        return False
    folder = Path(config.dataset.data_dir or f"data/{known}")
    return not folder.is_dir() or not any(
        path.name.endswith(sources.ENDINGS) for path in folder.iterdir()
    )


def known_examples(config: Config) -> int:
    """Training examples of a data set known by name, of which nothing is here."""
    dataset, name = config.dataset, _hub_name(config)
    assert name is not None, "data are here or known"
    records = KNOWN_EXAMPLES[name]
    if dataset.subset_size is not None:
        records = min(records, dataset.subset_size)
    return round(records * (1 - dataset.test_ratio - dataset.val_ratio))


def _hub_name(config: Config) -> str | None:
    if config.data.path is not None or config.dataset.name is None:
        return None
    name = config.dataset.name.lower().removeprefix("open-orca/")
    return name if name in KNOWN_EXAMPLES and not Path(config.dataset.name).exists() else None


def amount(config: Config) -> Amount:
    """Of a configuration whose data are there, or are known by name; see ``data.open_data`` for
    what is raised.

    Of deep supervision the most it can be: that no example halts before its last step.
    """
    data: Any = None if config.data.path is None else open_data(config)
    training = config.training
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    if config.objective.name != "act":
        from thimble.training.rows import open_rows

        rows = open_rows(data, training.sequence_length, config.seed)
        steps = total_steps(config, rows.count)
        seen = steps * batch
        return Amount(
            rows.count,
            training.sequence_length,
            steps,
            seen,
            seen / rows.count,
            tokens=rows.tokens,
        )
    from thimble.conversations.dataset import Conversations

    if data is None:
        examples, length = known_examples(config), float(config.dataset.seq_len)
    elif isinstance(data, Conversations):
        lengths = data.examples["length"][data.split("train")] - 1
        examples, length = len(lengths), float(lengths.mean()) if len(lengths) else 0.0
    else:
        examples, length = len(data.order(config.seed, 0)), float(data.metadata.seq_len)
    thought = config.model.halt_max_steps
    steps, ended = training.max_steps, False
    if training.max_epochs is not None:
        most = math.ceil(training.max_epochs * examples * thought / batch) + thought
        steps, ended = min(steps, most), most <= steps
    seen = steps * batch
    if training.max_epochs is not None:
        seen = min(seen, round(training.max_epochs * examples) * thought)
    return Amount(examples, length, steps, seen, seen / thought / max(examples, 1), ended)


def plan(config: Config) -> Plan:
    """The plan of a run, from its configuration and its data; see ``amount``."""
    training, optim = config.training, config.optim
    run = amount(config)
    steps, epochs = run.steps, run.epochs
    recursive = config.objective.name == "act"
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    tokens = round(run.seen * run.length)
    available = round(run.examples * run.length) if recursive else run.tokens
    parameters = config.model.num_parameters
    teacher = costs(config, run.examples)
    per_token = flops_per_token(config.model, training.sequence_length)
    per_token += teacher.flops_per_token if teacher else 0.0

    warnings = []
    if teacher and teacher.mode == "direct" and teacher.parameters is None:
        warnings.append(
            f"The teacher {config.teacher.path} is not here, or of another kind than llama and "
            "mistral: neither its memory nor its time is counted."
        )
    if config.data.path is None:
        folder = config.dataset.data_dir or f"data/{_hub_name(config)}"
        warnings.append(
            f"{folder} has no conversations yet. Assumed: {run.examples:,} for training, of the "
            f"{KNOWN_EXAMPLES[str(_hub_name(config))]:,} its documents speak of, each as long as "
            f"dataset.seq_len={config.dataset.seq_len} allows."
        )
    thought = config.model.halt_max_steps
    if recursive and thought > 1:
        warnings.append(
            f"Tokens, FLOPs and steps are counted as if every example were thought about for all "
            f"{thought} supervision steps; a halting head that learns makes it less."
        )
    if steps < training.max_steps and not recursive:
        warnings.append(
            f"The data give {steps:,} steps in {training.max_epochs:g} epochs, not the "
            f"{training.max_steps:,} of training.max_steps: the run ends there."
        )
    shorter = max(1, steps // 10)
    if optim.warmup_steps > max(steps / 5, shorter):
        share = f"{100 * optim.warmup_steps / steps:.0f} %"
        warnings.append(
            f"The warm-up of {optim.warmup_steps:,} steps is {share} of the run. "
            f"Try optim.warmup_steps={shorter}."
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
        halting_at_once=1 / thought if recursive and run.ended_by_examples else 1.0,
        examples=run.examples,
        teacher=teacher,
        warnings=warnings,
    )
