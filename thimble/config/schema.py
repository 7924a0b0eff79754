"""The configuration of a run: every key, its type, its range, its default and its meaning.

A key is defined in one place: those of ``model`` in ``config/model.py``, of what a student
learns and from whom in ``config/distillation.py``, all others here. Recipes
(``thimble/conf``) state what differs from these defaults, ``thimble explain`` prints the
descriptions, and a run's ``config.yaml`` holds all of it resolved. The defaults follow the training
specification (AdamW 3e-4, warm-up 2000, cosine to 10 %, 8 x 4 sequences, evaluation and checkpoint
every 5000 steps).
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, model_validator

from thimble.config.distillation import (
    ObjectiveConfig,
    SaddleConfig,
    TeacherConfig,
    check_teacher,
)
from thimble.config.model import ModelConfig
from thimble.config.section import Beta, Fraction, Section
from thimble.errors import ConfigError

TOKENIZER_VARIABLE = "LLAMA_TOKENIZER"


class DataConfig(Section):
    """Where the data are."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="Folder made by `thimble tokens build`, `thimble conversations build` or "
        "`thimble puzzles build`; null: made of the conversations of dataset.name.",
    )

    @property
    def folder(self) -> str:
        """``path``, of a run whose data are there (``training.data.ready``)."""
        assert self.path is not None, "conversations become tokens before anything is read"
        return self.path


class DatasetConfig(Section):
    """Which conversations a model learns from, and how they become tokens."""

    name: str | None = Field(
        default=None,
        min_length=1,
        description="slimorca or openorca (fetched from the hub), or a corpus, file or folder of "
        "your own; null: no conversations.",
    )
    data_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder with the files, or where they are fetched to; null: data/NAME.",
    )
    subset_size: int | None = Field(
        default=None,
        ge=1,
        description="So many records of the whole, drawn before the split; null: all.",
    )
    seq_len: int = Field(default=512, ge=1, description="Longest example, in input tokens.")
    test_ratio: Fraction = Field(
        default=0.05, description="Share of the prompts held out as the test split."
    )
    val_ratio: Fraction = Field(
        default=0.01,
        description="Share of the prompts held out to watch the training by; 0: none.",
    )
    tokenizer_path: str | None = Field(
        default=None,
        min_length=1,
        description=f"Folder, tokenizer.json or SentencePiece .model; null: ${TOKENIZER_VARIABLE}.",
    )
    vocab_size: int | None = Field(
        default=None, ge=2, description="Entries the tokenizer has to have; null: any."
    )
    template: Literal["plain", "chat"] = Field(
        default="plain",
        description="plain: [SYSTEM], [USER] and [ASSISTANT] lines; chat: the tokenizer's own.",
    )
    system_message: str = Field(
        default="A conversation between a user and a helpful assistant.",
        description='System text of conversations without one; "": none.',
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Of the subset, the split and the order."
    )
    dataloader_workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that tokenize, 0: none beside this one, null: one a core. Batches "
        "need none.",
    )

    def tokenizer(self) -> str:
        """The path of the tokenizer; ConfigError when neither the key nor the variable is set."""
        path = self.tokenizer_path or os.environ.get(TOKENIZER_VARIABLE)
        if not path:
            raise ConfigError(
                "Which tokenizer? Name a folder, a tokenizer.json or a SentencePiece .model with "
                "--tokenizer PATH (in a recipe dataset.tokenizer_path=PATH), or set the variable "
                f"{TOKENIZER_VARIABLE}."
            )
        return path


class OptimConfig(Section):
    """Optimizer and learning-rate schedule: linear warm-up, plateau, cosine."""

    name: Literal["adamw", "muon", "adam_atan2"] = Field(
        default="adamw",
        description="muon: Muon for the matrices, AdamW for the rest; adam_atan2: Adam with atan2 "
        "for its quotient, which needs no eps.",
    )
    learning_rate: float = Field(default=3e-4, gt=0, le=1, description="Highest learning rate.")
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.95], description="Decay of AdamW's first and second moment."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to AdamW's denominator.")
    momentum: Beta = Field(default=0.95, description="Decay of Muon's momentum.")
    adamw_lr_ratio: float = Field(
        default=1.0,
        gt=0,
        description="With muon: the rate of what AdamW updates (embedding, head, norms), as a "
        "multiple of the learning rate.",
    )
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        description="Decoupled weight decay, of the matrices.",
    )
    grad_clip: float = Field(
        default=1.0, gt=0, description="Gradients are scaled to at most this norm."
    )
    warmup_steps: int = Field(
        default=2000, ge=0, description="Steps from zero to the learning rate."
    )
    plateau_steps: int = Field(
        default=0, ge=0, description="Steps at the learning rate between warm-up and cosine."
    )
    min_lr_ratio: Fraction = Field(
        default=0.1, description="The last learning rate, as a fraction of the highest."
    )
    ema_rate: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of the moving average of the weights, which is then what is evaluated "
        "and kept; null: none.",
    )
    puzzle_emb_lr: float = Field(
        default=1e-2, gt=0, le=1, description="Highest learning rate of the puzzles' embeddings."
    )
    puzzle_emb_weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay of the puzzles' embeddings."
    )
    freeze_weights: bool = Field(
        default=False,
        description="Train the puzzles' embeddings alone: new puzzles for weights that have "
        "learned others.",
    )


class TrainingConfig(Section):
    """Length of the run, its batches, and how often it logs, evaluates and saves."""

    max_steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Ends after this many passes over the data; null: no limit.",
    )
    sequence_length: int = Field(ge=1, description="Tokens of one training window.")
    micro_batch_size: int = Field(
        default=8, ge=1, description="Windows in one forward pass, per process."
    )
    gradient_accumulation_steps: int = Field(
        default=4, ge=1, description="Forward passes whose gradients make one step."
    )
    data_parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="Of several processes (torchrun). ddp: each holds the whole model; fsdp: each "
        "holds a shard of weights, gradients and moments, for what does not fit.",
    )
    log_every: int = Field(default=100, ge=1, description="Steps between two training records.")
    eval_every: int = Field(
        default=5000,
        ge=0,
        description="Steps between two evaluations, one at the end besides; 0: none at all.",
    )
    save_every: int = Field(default=5000, ge=1, description="Steps between two checkpoints.")
    keep_last: int = Field(
        default=5, ge=1, description="Newest checkpoints kept, beside the best one."
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="torch.compile; auto: where it pays off. DISABLE_COMPILE=1 means off.",
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="Compute each block's activations again for the backward pass: less memory, "
        "more time.",
    )
    load_checkpoint: str | None = Field(
        default=None,
        min_length=1,
        description="Checkpoint or run whose weights this run begins with; null: drawn anew.",
    )
    init_from_teacher: bool = Field(
        default=False,
        description="Begin with as much of the weights of teacher.path as there is room for, in "
        "place of drawn ones. The teacher is a llama or mistral of any size.",
    )
    skip_windows: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(
        default=[],
        description="Places in the order of the windows, [first, end), that no step takes; "
        "a retry passes over a bad batch so.",
    )
    deterministic: bool = Field(
        default=False,
        description="Deterministic kernels only: slower, repeatable to the bit.",
    )


class EvaluationConfig(Section):
    """What an evaluation during training measures and shows."""

    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Validation tokens an evaluation reads; null: all.",
    )
    max_examples: int | None = Field(
        default=None,
        ge=1,
        description="Of conversations and puzzles: examples an evaluation reads; null: all.",
    )
    prompts: list[str] = Field(
        default=["The kernel module", "Question: What does the command mount do?\nAnswer:"],
        description="Beginnings of the sample generations.",
    )
    sample_tokens: int = Field(default=64, ge=1, description="Length of a sample, in tokens.")
    temperature: float = Field(
        default=0.8, ge=0, description="Of the samples; 0: the likeliest token."
    )
    top_k: int = Field(
        default=50, ge=0, description="Samples draw from this many tokens; 0: from all."
    )


class GuardsConfig(Section):
    """When a run is stopped for its own good. NaN and Inf always stop it."""

    max_grad_norm: float = Field(
        default=1000.0,
        gt=0,
        description="A gradient norm above this (before clipping) stops.",
    )
    plateau_steps: int = Field(
        default=10000, ge=1, description="Steps without a lower smoothed loss that stop the run."
    )


class AcceptanceConfig(Section):
    """The gate of `thimble accept`."""

    perplexity: float | None = Field(
        default=None, gt=1, description="Validation perplexity must be below this; null: no gate."
    )
    size_tolerance: Fraction = Field(
        default=0.1, description="Allowed deviation of the checkpoint's size from the expected one."
    )


class LoggingConfig(Section):
    """Where the records of metrics.jsonl are shown as well."""

    tensorboard: bool = Field(default=True, description="Write TensorBoard event files.")
    wandb: bool | None = Field(
        default=False,
        description="Log to Weights & Biases (extra `wandb`); null: offline where the extra is, "
        "unless WANDB_MODE says otherwise.",
    )
    trackio: bool = Field(default=False, description="Log to Trackio (extra `trackio`).")


class Config(Section):
    """Everything that determines a run."""

    recipe: str = Field(min_length=1, description="Recipe the run was made from.")
    seed: int = Field(
        default=1, ge=0, lt=2**63, description="Of initial weights, data order and samples."
    )
    output_dir: str = Field(default="runs", min_length=1, description="Folder of all runs.")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = Field(
        default="auto", description="auto, cpu, cuda, cuda:0, cuda:1, ... or mps."
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of the matrix products; auto: bfloat16 where the hardware has it, "
        "float16 on older GPUs, else float32.",
    )
    model: ModelConfig
    data: DataConfig = DataConfig()
    dataset: DatasetConfig = DatasetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    guards: GuardsConfig = GuardsConfig()
    saddle: SaddleConfig = SaddleConfig()
    acceptance: AcceptanceConfig = AcceptanceConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def check_lengths(self) -> Config:
        window, context = self.training.sequence_length, self.model.max_position_embeddings
        if window > context:
            raise ValueError(
                f"training.sequence_length={window} is longer than "
                f"model.max_position_embeddings={context}. The nearest that fit:\n"
                f"  training.sequence_length={context}\n  model.max_position_embeddings={window}"
            )
        return self

    @model_validator(mode="after")
    def check_objective(self) -> Config:
        recursive = self.model.schedule == "recursive"
        # Retention carries a state for each call, so its recursion also learns without halting.
        either = recursive and self.model.mixer == "retention"
        if recursive != (self.objective.name == "act") and not either:
            raise ValueError(
                f"objective.name={self.objective.name} does not train a model with "
                f"model.schedule={self.model.schedule}. Use one of:\n"
                f"  objective.name={'act' if recursive else 'next_token'}\n"
                f"  model.schedule={'once' if recursive else 'recursive'}"
            )
        if self.optim.freeze_weights:
            self._check_frozen()
        if self.data.path is None and self.dataset.name is None:
            raise ValueError(
                "There is nothing to train on. Name a folder of data, or conversations:\n"
                "  data.path=data/tokens/NAME\n  dataset.name=slimorca"
            )
        if self.dataset.name is not None:
            if not self.model.causal:
                raise ValueError(
                    "model.causal=false has no place in a language model: it would be given the "
                    "words it is asked for. Use:\n  model.causal=true"
                )
            if not recursive:
                raise ValueError(
                    "Conversations (dataset.name) train recursive models. Use:\n"
                    "  model.schedule=recursive"
                )
            if self.objective.name != "act":
                raise ValueError(
                    f"objective.name={self.objective.name} learns from plain text, not from "
                    "conversations (dataset.name). Use:\n  objective.name=act"
                )
            if self.training.sequence_length != self.dataset.seq_len:
                raise ValueError(
                    f"dataset.seq_len={self.dataset.seq_len} and training.sequence_length="
                    f"{self.training.sequence_length} say the same thing differently. Use:\n"
                    f"  training.sequence_length={self.dataset.seq_len}"
                )
        return self

    @model_validator(mode="after")
    def check_distillation(self) -> Config:
        if self.objective.name == "distill":
            check_teacher(self.objective, self.teacher)
        return self

    @model_validator(mode="after")
    def check_beginning(self) -> Config:
        if not self.training.init_from_teacher:
            return self
        if self.teacher.path is None or self.teacher.mode == "served":
            raise ValueError(
                "training.init_from_teacher begins with weights that are here: name them with "
                "teacher.path, and use:\n  teacher.mode=direct"
            )
        if self.training.load_checkpoint is not None or self.model.schedule != "once":
            raise ValueError(
                "training.init_from_teacher is one way to begin, for a stack that runs once. Use "
                "one of:\n  training.init_from_teacher=false\n  training.load_checkpoint=null "
                "model.schedule=once"
            )
        return self

    def _check_frozen(self) -> None:
        """What ``optim.freeze_weights`` goes with: something to keep, and something to train."""
        if not self.model.puzzle_identifiers:
            raise ValueError(
                "optim.freeze_weights trains the embeddings of puzzles alone, and there are none. "
                "Use one of:\n  optim.freeze_weights=false\n  model.puzzle_identifiers=1"
            )
        if self.training.load_checkpoint is None:
            raise ValueError(
                "optim.freeze_weights keeps weights that have not learned anything yet. Name those "
                "to begin with:\n  training.load_checkpoint=runs/..."
            )
