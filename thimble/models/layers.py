"""The pieces every core is made of: linear maps, RMSNorm, rotary positions, SwiGLU.

Shapes: B batch, T time, D hidden size, H query heads, K key/value heads, C head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear map without bias whose float32 weight follows the input's dtype.

    Six lines instead of autocast: the master weights stay float32 for the optimizer, the product
    runs in bfloat16 where the activations do, and nothing depends on a global mode. Several heights
    make one product of as many maps; ``parts`` remembers them.
    """

    def __init__(self, in_features: int, *out_features: int) -> None:
        super().__init__(in_features, sum(out_features), bias=False)
        self.parts = out_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # torch squares and averages in float32 whatever the input's dtype is.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a scale."""
    return F.rms_norm(x, x.shape[-1:], None, eps)


def rotary_table(length: int, head_dim: int, theta: float, start: int = 0) -> Tensor:
    """cos and sin of ``length`` positions from ``start`` on as one float32 tensor [2, T, C]
    (RoFormer, arXiv:2104.09864).

    The two halves of a head are rotated against each other, as transformers does it, so that
    weights carry over without permutation. The sine of the first half has its sign already.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(start, start + length, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).float()


def rotary_rows(table_2tc: Tensor, past: int, time: int, theta: float) -> Tensor:
    """The rows [2, time, C] of positions from ``past`` on; those beyond the table are made anew."""
    if past + time <= table_2tc.shape[1]:
        return table_2tc[:, past : past + time]
    return rotary_table(time, table_2tc.shape[2], theta, past).to(table_2tc.device)


def rotate(x_bhtc: Tensor, rope_2tc: Tensor) -> Tensor:
    """Rotate queries or keys [B, H, T, C] by their positions' angles."""
    cos, sin = rope_2tc.to(x_bhtc.dtype)
    return torch.addcmul(x_bhtc * cos, x_bhtc.roll(x_bhtc.shape[-1] // 2, dims=-1), sin)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202).

    gate and up are one matrix, since one large product is faster than two small ones.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, intermediate_size, intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
