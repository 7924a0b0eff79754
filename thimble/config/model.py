"""The keys of ``model.*``: the shape of a model, and what goes together in it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from thimble.config.section import Fraction, Section

Horizon = Annotated[float, Field(gt=1)]
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
        "position_embedding",
        "q_continue",
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
    position_embedding: Literal["rope", "learned", "none"] = Field(
        default="rope",
        description="Recursive: how a position is known. rope: attention turns its queries and "
        "keys; learned: a trained vector each, added to the token's.",
    )
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
    q_continue: bool = Field(
        default=False,
        description="Recursive: the halting head also learns what going on is worth, and halts "
        "where halting is worth more (HRM), not where it is likelier right than wrong (TRM).",
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
        if self.position_embedding == "learned":
            raise ValueError(
                "model.position_embedding=learned ends with the context, and the memory of "
                "model.mixer=retention goes on beyond it. Use one of:\n"
                "  model.position_embedding=rope\n  model.position_embedding=none"
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
                "have it: it would be given the words it is asked for. Use:\n"
                "  model.mixer=attention\nor, for puzzles:\n  model.causal=false"
            )
        if not self.causal and self.schedule == "once":
            raise ValueError(
                "model.causal=false is for puzzles, and they need:\n  model.schedule=recursive"
            )
        if self.position_embedding != "rope" and self.schedule == "once":
            raise ValueError(
                f"model.position_embedding={self.position_embedding} is of recursive models. Use "
                "one of:\n  model.position_embedding=rope\n  model.schedule=recursive"
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
        if self.q_continue and self.halt_max_steps == 1:
            raise ValueError(
                "model.q_continue learns what a further step is worth, and there is none. Use one "
                "of:\n  model.q_continue=false\n  model.halt_max_steps=16"
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
            places = self.num_positions if self.position_embedding == "learned" else 0
            halting = 2 * (width + 1)
            vectors = (self.puzzle_identifiers + places) * width
            return embeddings + vectors + blocks * block + halting
        return embeddings + self.num_hidden_layers * (block + 2 * width) + width
