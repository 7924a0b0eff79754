"""The language model: embedding -> core -> head.

The core is a stack of pre-norm blocks run once. Which mixer a block has and how often the stack
runs are two independent choices of the configuration; ``recursive.py`` has the other schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thimble.errors import ConfigError
from thimble.models.attention import Attention, KVCache, document_mask
from thimble.models.layers import Linear, RMSNorm, SwiGLU, rotary_rows, rotary_table
from thimble.models.retention import Retention, RetentionState

if TYPE_CHECKING:
    from thimble.config.model import ModelConfig

# What a layer keeps of the positions it has seen.
LayerState = KVCache | RetentionState


def documents_for(
    config: ModelConfig, starts_bt: Tensor | None, state: Any = None
) -> Tensor | None:
    """``starts`` [B, T] as the mixer of each block takes them: retention as they are, attention as
    a mask. Attention has no state that knows them."""
    if starts_bt is None or config.mixer == "retention":
        return starts_bt
    assert config.mixer == "attention"
    assert config.causal
    assert not state
    return document_mask(starts_bt)


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer: Any  # Attention or Retention
        if config.mixer == "retention":
            self.mixer = Retention(config)
        else:
            self.mixer = Attention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
            )
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_btd: Tensor,
        rope_2tc: Tensor,
        state: LayerState | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        mixed, _ = self.mixer(self.mixer_norm(x_btd), rope_2tc, state, documents)
        x_btd = x_btd + mixed
        return x_btd + self.mlp(self.mlp_norm(x_btd))


class CausalLM(nn.Module):
    """A decoder-only model: RMSNorm, rotary positions, grouped-query attention (or retention),
    SwiGLU.

    Parameters are float32; ``compute_dtype`` is what activations and products run in. The head
    shares the embedding's weight when ``tie_word_embeddings`` is set. With
    ``checkpoint_activations`` a block keeps only its input for the backward pass.
    """

    rope_2tc: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.schedule != "once":
            raise ConfigError(
                f"model.schedule={config.schedule} has no place here: this is the model whose "
                "stack runs once. Use:\n  model.schedule=once"
            )
        self.config = config
        self.compute_dtype = torch.float32
        self.checkpoint_activations = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        table = rotary_table(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.register_buffer("rope_2tc", table, persistent=False)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> CausalLM:
        """Normal weights of ``initializer_range``; the two maps that write into the residual are
        divided by sqrt(2 x layers), so that its variance does not grow with depth (GPT-2).

        The first loss is then ln(vocabulary) to within a few per cent.
        """
        std = self.config.initializer_range
        scale = 1 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
            else:
                writes = name.endswith(("mixer.output.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=std * scale if writes else std, generator=generator)
        return self

    def num_parameters(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def new_state(self, batch: int, capacity: int | None = None) -> Sequence[LayerState]:
        """Nothing seen yet, for ``batch`` sequences of ``capacity`` (default: context) positions.

        Retention's states have no end; ``capacity`` means nothing to them.
        """
        config = self.config
        if config.mixer == "retention":
            return [m.new_state(batch) for m in self.modules() if isinstance(m, Retention)]
        like = torch.empty(0, dtype=self.compute_dtype, device=self.embedding.weight.device)
        length = min(capacity or config.max_position_embeddings, config.max_position_embeddings)
        heads, size = config.num_key_value_heads, config.head_dim
        return [KVCache(batch, heads, length, size, like) for _ in self.blocks]

    def hidden(
        self,
        ids_bt: Tensor,
        state: Sequence[LayerState] | None = None,
        starts_bt: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, T] -> normalised hidden states [B, T, D] in ``compute_dtype``.

        ``starts`` [B, T] is true where a document begins, which then sees nothing of those before
        it.
        """
        documents = documents_for(self.config, starts_bt, state)
        past = state[0].length if state else 0
        rope = rotary_rows(self.rope_2tc, past, ids_bt.shape[1], self.config.rope_theta)
        x = F.embedding(ids_bt, self.embedding.weight).to(self.compute_dtype)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            if recompute:
                x = checkpoint(block, x, rope, None, documents, use_reentrant=False)
            else:
                x = block(x, rope, state[index] if state else None, documents)
        return self.norm(x)

    def forward(
        self,
        ids_bt: Tensor,
        state: Sequence[LayerState] | None = None,
        starts_bt: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, T] -> float32 logits [B, T, vocabulary]; see ``hidden``."""
        return self.head(self.hidden(ids_bt, state, starts_bt)).float()
