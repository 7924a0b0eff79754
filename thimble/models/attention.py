"""Grouped-query attention with rotary positions and a key/value cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thimble.models.layers import Linear, rotate


class KVCache:
    """Keys and values of the positions seen so far: [B, K, capacity, C] each, filled from left.

    ``mask``, where it is set, says what the positions of the next call see, where some are padding:
    bool [B, 1, T, S] over all S positions, past and new.
    """

    mask: Tensor | None = None

    def __init__(self, batch: int, heads: int, capacity: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_zeros(batch, heads, capacity, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, K, T, C] and return everything up to and including it."""
        start, end = self.length, self.length + keys.shape[2]
        assert end <= self.capacity, "the caller keeps within the context"
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


# In bfloat16 a CPU with instructions for it trains faster with the scores written out, up to this
# many positions: torch's CPU flash attention takes several times its forward for its backward
# there. In float32 torch's is the faster one at every length (`benchmarks/train_cpu.py
# --attention` measures both in the machine's precision).
SHORT = 512


def short_causal_attention(q_bhtc: Tensor, k_bktc: Tensor, v_bktc: Tensor) -> Tensor:
    """Causal attention with explicit scores; grouped heads read their key without a copy of it."""
    batch, heads, time, size = q_bhtc.shape
    kv_heads = k_bktc.shape[1]
    group = heads // kv_heads
    q = (q_bhtc * size**-0.5).reshape(batch, kv_heads, group * time, size)
    future = q.new_full((time, time), float("-inf")).triu(1)
    scores = (q @ k_bktc.transpose(-1, -2)).view(batch, kv_heads, group, time, time) + future
    weights = scores.softmax(-1).view(batch, kv_heads, group * time, time)
    return (weights @ v_bktc).view(batch, heads, time, size)


def document_mask(starts_bt: Tensor) -> Tensor:
    """What each position sees where documents begin at ``starts`` [B, T] and see nothing of one
    another: those up to it in its own. Bool [B, 1, T, T]."""
    document = starts_bt.cumsum(1)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245), causal unless told otherwise.

        query heads   0 1 2 3 4 5        H = 6
                      | | | | | |
        key/value      0    1            K = 2: heads 0-2 read the first, 3-5 the second

    ``head_dim`` is independent of ``hidden_size / H``: the specification's tiny model has 6 heads
    and 256 channels. Queries, keys and values come from one matrix; with ``gated`` it first makes
    gates, whose sigmoids multiply the heads' outputs (arXiv:2505.06708).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        causal: bool = True,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.causal, self.gated = causal, gated
        parts = [num_heads] * gated + [num_heads, num_kv_heads, num_kv_heads]
        self.qkv = Linear(hidden_size, *(heads * head_dim for heads in parts))
        self.output = Linear(num_heads * head_dim, hidden_size)

    def forward(
        self,
        x_btd: Tensor,
        rope_2tc: Tensor,
        state: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """[B, T, D] -> [B, T, D]; ``rope_2tc`` holds the rows of these T positions, for all rows
        of the batch or, as [2, B, 1, T, C], for each.

        With a ``state`` the T positions follow the ones in it; they are added to it in place. Only
        causal attention has one. ``mask``, without a state: see ``document_mask``.
        """
        batch, time, _ = x_btd.shape
        heads, kv_heads, size = self.num_heads, self.num_kv_heads, self.head_dim
        made = self.qkv(x_btd)
        if self.gated:
            gate, made = made.split([heads * size, (heads + 2 * kv_heads) * size], dim=-1)
        qkv = made.view(batch, time, heads + 2 * kv_heads, size).transpose(1, 2)
        # Queries and keys are neighbours, so one call rotates both.
        rotated = rotate(qkv[:, : heads + kv_heads], rope_2tc)
        q, k = rotated[:, :heads], rotated[:, heads:]
        v = qkv[:, heads + kv_heads :]
        on_cpu = q.device.type == "cpu" and q.dtype is torch.bfloat16
        short = self.causal and on_cpu and time <= SHORT
        if state is None and mask is None and short and torch.is_grad_enabled():
            y = short_causal_attention(q, k, v)
        else:
            if state is not None:
                k, v = state.append(k, v)
                past = k.shape[2] - time
                mask = state.mask
                if mask is None and past and time > 1:
                    # A block after a prefix: every position sees the prefix.
                    mask = q.new_ones(time, past + time, dtype=torch.bool).tril(past)
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=bool(self.causal and mask is None and time > 1),
                enable_gqa=heads != kv_heads,
            )
        y = y.transpose(1, 2).reshape(batch, time, heads * size)
        if self.gated:
            y = y * gate.sigmoid()
        return self.output(y), state
