"""AdamW with decay on matrices only, and the warm-up and cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from thimble.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of the update number ``step`` (from 0): linear warm-up, cosine to ``min_lr_ratio``.

    The first update has rate / warm-up, not zero; the last exactly ``min_lr_ratio`` of the peak.
    """
    peak, floor = config.learning_rate, config.learning_rate * config.min_lr_ratio
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    last = max(total_steps - 1 - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / last, 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW. Matrices decay; norms and the embedding do not.

    A norm's scale has no direction to shrink, and a rare token's embedding, seldom updated, would
    fade between its occurrences. Each group carries ``names`` so that saved state can be matched.
    """
    decay: list[tuple[str, nn.Parameter]] = []
    keep: list[tuple[str, nn.Parameter]] = []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
        (decay if matrix else keep).append((name, parameter))
    groups = [
        {
            "params": [parameter for _, parameter in members],
            "weight_decay": weight_decay,
            "names": [name for name, _ in members],
        }
        for members, weight_decay in ((decay, config.weight_decay), (keep, 0.0))
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )
