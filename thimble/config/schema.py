"""The configuration of a run: every key, its type, its range, its default and its meaning.

This file is the only place where a key is defined. Recipes (``thimble/conf``) state what differs
from these defaults, ``thimble explain`` prints the descriptions, and a run's ``config.yaml`` holds
all of it resolved. The defaults follow the training specification (AdamW 3e-4, warm-up 2000, cosine
to 10 %, 8 x 4 sequences, evaluation and checkpoint every 5000 steps).
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from thimble.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Horizon = Annotated[float, Field(gt=1)]

TOKENIZER_VARIABLE = "LLAMA_TOKENIZER"


class Section(BaseModel):
    """A group of keys. Unknown keys, silent conversions, NaN and Inf are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# Keys of ModelConfig that mean something for ``schedule: recursive`` only.
RECURSIVE_KEYS = frozenset(
    {
        "causal",
        "H_cycles",
        "L_cycles",
        "bp_cycles",
        "separate_stacks",
        "single_z",
        "pre_norm",
        "attention_gate",
        "inject_input",
        "embedding_scale",
        "halt_max_steps",
        "halt_exploration_prob",
        "puzzle_identifiers",
        "puzzle_emb_len",
    }
)


class ModelConfig(Section):
    """Shape of the model: embedding, blocks of a mixer and SwiGLU, head."""

    mixer: Literal["attention", "retention", "mlp"] = Field(
        default="attention",
        description="How positions exchange values. retention: linear time, and a memory of fixed "
        "size however long the text (RetNet); mlp: SwiGLU over a fixed number of positions, "
        "which sees the future, so for puzzles.",
    )
    schedule: Literal["once", "recursive"] = Field(
        default="once",
        description="How often the stack of blocks runs. recursive: in H and L cycles, again and "
        "again under supervision (TRM, HRM).",
    )
    vocab_size: int = Field(ge=2, description="Entries of the tokenizer's vocabulary.")
    hidden_size: int = Field(ge=1, description="Width of the residual stream.")
    intermediate_size: int = Field(ge=1, description="Inner width of the SwiGLU layer.")
    num_hidden_layers: int = Field(ge=1, description="Number of blocks of a stack.")
    num_attention_heads: int = Field(ge=1, description="Query heads of each block.")
    num_key_value_heads: int = Field(
        ge=1, description="Key and value heads; each serves a group of query heads."
    )
    head_dim: int = Field(ge=2, description="Width of one head; even, since RoPE turns pairs.")
    max_position_embeddings: int = Field(ge=1, description="Longest context, in tokens.")
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the RoPE wavelengths.")
    rms_norm_eps: float = Field(
        default=1e-5, gt=0, description="Added to the mean square in RMSNorm."
    )
    tie_word_embeddings: bool = Field(
        default=True, description="One matrix for embedding and head."
    )
    initializer_range: float = Field(
        default=0.02,
        gt=0,
        description="Standard deviation of the initial weights; a recursive model's is "
        "1/sqrt(inputs).",
    )
    value_head_dim: int | None = Field(
        default=None,
        ge=1,
        description="Retention: width of one head's values; null: head_dim. Twice head_dim is the "
        "paper's.",
    )
    retention_horizons: Annotated[list[Horizon], Field(min_length=2, max_length=2)] = Field(
        default=[32.0, 65536.0],
        description="Retention: positions over which the fastest and the slowest head forget, "
        "1 / (1 - gamma); those between are spaced by equal factors.",
    )
    retention_chunk: int = Field(
        default=64,
        ge=1,
        description="Retention: positions computed at once; the result does not depend on it.",
    )
    causal: bool = Field(
        default=True, description="A position sees only itself and those before it."
    )
    H_cycles: int = Field(
        default=3, ge=1, description="Recursive: updates of z_H in a supervision step."
    )
    L_cycles: int = Field(
        default=6, ge=1, description="Recursive: updates of z_L before each update of z_H."
    )
    bp_cycles: int = Field(
        default=1,
        ge=0,
        description="Recursive: last H cycles that gradients go through; 0: only through the last "
        "call of each stack (HRM).",
    )
    separate_stacks: bool = Field(
        default=False,
        description="Recursive: z_H and z_L have a stack each (HRM) instead of one for both (TRM).",
    )
    single_z: bool = Field(
        default=False, description="Recursive: one latent, updated L_cycles times in an H cycle."
    )
    pre_norm: bool = Field(
        default=False,
        description="Recursive: norms before mixer and MLP and at a stack's end (HRM-Text) instead "
        "of after mixer and MLP (TRM, HRM).",
    )
    attention_gate: bool = Field(
        default=False,
        description="Recursive: a sigmoid of the input scales each value of the attention's output "
        "(HRM-Text).",
    )
    inject_input: bool = Field(
        default=True,
        description="Recursive: every update of z_L is given the input; false: z_H begins as the "
        "input instead (HRM-Text).",
    )
    embedding_scale: float | None = Field(
        default=None,
        gt=0,
        description="Recursive: what the embedding is multiplied by; null: sqrt(hidden_size).",
    )
    halt_max_steps: int = Field(
        default=16, ge=1, description="Recursive: supervision steps an example gets at most."
    )
    halt_exploration_prob: Fraction = Field(
        default=0.1,
        description="Recursive: how often a training row may not halt before a number of steps "
        "drawn from 2 to halt_max_steps.",
    )
    puzzle_identifiers: int = Field(
        default=0,
        ge=0,
        description="Recursive: puzzles with an embedding of their own; 0: there are none.",
    )
    puzzle_emb_len: int = Field(
        default=16,
        ge=1,
        description="Recursive: positions before the tokens for the puzzle's embedding, if any.",
    )

    @model_validator(mode="after")
    def check_shape(self) -> ModelConfig:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            fewer = min(divisors, key=lambda n: (abs(n - kv_heads), n))
            raise ValueError(
                f"model.num_attention_heads={heads} is not a multiple of "
                f"model.num_key_value_heads={kv_heads}. The nearest that fit:\n"
                f"  model.num_key_value_heads={fewer}\n"
                f"  model.num_attention_heads={max(1, round(heads / kv_heads)) * kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim={self.head_dim} is odd, and RoPE turns pairs of values. "
                f"The nearest that fit:\n  model.head_dim={self.head_dim - 1}\n"
                f"  model.head_dim={self.head_dim + 1}"
            )
        return self

    @model_validator(mode="after")
    def check_retention(self) -> ModelConfig:
        if self.mixer != "retention":
            return self
        heads = self.num_attention_heads
        if self.num_key_value_heads != heads:
            raise ValueError(
                "model.mixer=retention has a memory for each head, so keys and values are not "
                f"shared. Use:\n  model.num_key_value_heads={heads}"
            )
        fastest, slowest = self.retention_horizons
        if slowest < fastest:
            raise ValueError(
                f"model.retention_horizons=[{fastest:g},{slowest:g}] must grow. Use:\n"
                f"  model.retention_horizons=[{slowest:g},{fastest:g}]"
            )
        if not self.causal:
            raise ValueError(
                "model.mixer=retention sees only the past. Use one of:\n"
                "  model.causal=true\n  model.mixer=attention"
            )
        return self

    @model_validator(mode="after")
    def check_schedule(self) -> ModelConfig:
        if self.mixer == "mlp" and self.causal:
            raise ValueError(
                "model.mixer=mlp mixes all positions, later ones too, so no language model can "
                "have it: it would be given the words it is asked for. Use one of:\n"
                "  model.mixer=attention\n  model.causal=false"
            )
        if not self.causal and self.schedule == "once":
            raise ValueError(
                "model.causal=false is for puzzles, and they need:\n  model.schedule=recursive"
            )
        if self.puzzle_identifiers and self.causal:
            raise ValueError(
                "model.puzzle_identifiers puts the puzzle before the tokens, for models that see "
                "all positions. Use one of:\n  model.puzzle_identifiers=0\n  model.causal=false"
            )
        if self.bp_cycles > self.H_cycles:
            raise ValueError(
                f"model.bp_cycles={self.bp_cycles} is more than model.H_cycles={self.H_cycles}. "
                f"The nearest that fit:\n  model.bp_cycles={self.H_cycles}\n"
                f"  model.H_cycles={self.bp_cycles}"
            )
        if self.single_z and self.separate_stacks:
            raise ValueError(
                "model.single_z has no z_H for a second stack to update. Use one of:\n"
                "  model.separate_stacks=false\n  model.single_z=false"
            )
        if self.attention_gate and self.mixer != "attention":
            raise ValueError(
                "model.attention_gate belongs to attention. Use one of:\n"
                "  model.attention_gate=false\n  model.mixer=attention"
            )
        if not self.inject_input:
            self._check_input_in_latent()
        return self

    def _check_input_in_latent(self) -> None:
        """What ``inject_input=false`` goes with: the input is in z_H, once and for all cycles."""
        if self.single_z:
            raise ValueError(
                "model.inject_input=false needs a z_H to put the input in. Use one of:\n"
                "  model.single_z=false\n  model.inject_input=true"
            )
        if self.halt_max_steps > 1:
            raise ValueError(
                "model.inject_input=false begins with the input in z_H, so a second supervision "
                "step would begin anew. Use one of:\n"
                "  model.halt_max_steps=1\n  model.inject_input=true"
            )
        if self.bp_cycles < self.H_cycles:
            raise ValueError(
                "model.inject_input=false gives the input to the first cycle alone: without "
                "gradients through that one the embedding would not learn. Use one of:\n"
                f"  model.bp_cycles={self.H_cycles}\n  model.inject_input=true"
            )

    @property
    def num_positions(self) -> int:
        """Longest sequence the blocks see: the tokens, and before them the puzzle's positions."""
        prefix = self.puzzle_emb_len if self.puzzle_identifiers else 0
        return prefix + self.max_position_embeddings

    @property
    def value_width(self) -> int:
        """Width of the values of one head of retention."""
        return self.value_head_dim or self.head_dim

    @property
    def mlp_mixer_width(self) -> int:
        """Inner width of the mlp mixer: 8/3 of the positions, in whole 256s, as TRM has it."""
        return -(-round(self.num_positions * 8 / 3) // 256) * 256

    @property
    def blocks_per_step(self) -> int:
        """Blocks that run in one supervision step of a recursive model."""
        calls = self.H_cycles * (self.L_cycles + (0 if self.single_z else 1))
        return calls * self.num_hidden_layers

    @property
    def blocks_with_gradients(self) -> int:
        """Of ``blocks_per_step`` those that gradients go through."""
        high = 0 if self.single_z else 1
        calls = self.bp_cycles * (self.L_cycles + high) or 1 + high
        return calls * self.num_hidden_layers

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, exactly; a tied embedding counts once."""
        width, head_width = self.hidden_size, self.head_dim
        gates = self.num_attention_heads if self.attention_gate else 0
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) + gates
        mixer = width * head_width * heads
        if self.mixer == "mlp":
            mixer = 3 * self.num_positions * self.mlp_mixer_width
        elif self.mixer == "retention":  # q, k; v, gate, output
            mixer = self.num_attention_heads * width * (2 * head_width + 3 * self.value_width)
        block = mixer + 3 * width * self.intermediate_size
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        if self.schedule == "recursive":
            blocks = self.num_hidden_layers * (2 if self.separate_stacks else 1)
            halting = 2 * (width + 1)
            return embeddings + self.puzzle_identifiers * width + blocks * block + halting
        return embeddings + self.num_hidden_layers * (block + 2 * width) + width


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


class ObjectiveConfig(Section):
    """What the model is trained to do."""

    name: Literal["next_token", "act"] = Field(
        default="next_token",
        description="The loss. act: deep supervision with halting, of recursive models.",
    )
    form: Literal["softmax", "stablemax"] = Field(
        default="softmax", description="With act: what makes probabilities of logits."
    )
    per_sequence: bool = Field(
        default=False,
        description="With act: the mean over each example's tokens first, as the papers have it, "
        "instead of over all tokens.",
    )


class OptimConfig(Section):
    """Optimizer and learning-rate schedule: linear warm-up, then cosine."""

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
    eval_every: int = Field(default=5000, ge=1, description="Steps between two evaluations.")
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


class SaddleConfig(Section):
    """When a run counts as stuck at a saddle, and whether something is done about it.

    Everything is relative to the run itself, so nothing here depends on model or vocabulary.
    """

    interventions: bool = Field(
        default=False,
        description="Raise the learning rate for a while at a saddle; false: only tell of it.",
    )
    patience: int = Field(
        default=150, ge=1, description="Steps over which the loss has to have stood still."
    )
    min_improvement: float = Field(
        default=0.005,
        gt=0,
        lt=1,
        description="Falling by less than this fraction of the run's whole fall is standing still.",
    )
    grad_norm_ratio: float = Field(
        default=0.5,
        gt=0,
        description="A gradient norm below this fraction of the run's steep steps is gentle.",
    )
    finished: Fraction = Field(
        default=0.9,
        description="A loss that has fallen by this fraction of the first one is at its end.",
    )
    escape: float = Field(
        default=0.01, gt=0, lt=1, description="Fall, as a fraction, after which it has been left."
    )
    cooldown: int = Field(
        default=250, ge=0, description="Steps after one in which no other is looked for."
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
        if recursive != (self.objective.name == "act"):
            raise ValueError(
                f"objective.name={self.objective.name} does not train a model with "
                f"model.schedule={self.model.schedule}. Use one of:\n"
                f"  objective.name={'act' if recursive else 'next_token'}\n"
                f"  model.schedule={'once' if recursive else 'recursive'}"
            )
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
            if self.training.sequence_length != self.dataset.seq_len:
                raise ValueError(
                    f"dataset.seq_len={self.dataset.seq_len} and training.sequence_length="
                    f"{self.training.sequence_length} say the same thing differently. Use:\n"
                    f"  training.sequence_length={self.dataset.seq_len}"
                )
        return self
