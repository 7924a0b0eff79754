"""The plain language-modelling objective: cross-entropy of the next token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM
from thimble.objectives.linear_cross_entropy import linear_cross_entropy


class NextToken(nn.Module):
    """inputs [B, T], targets [B, T] (already shifted, -100 ignored), and where documents begin that
    see nothing of one another [B, T] -> summed loss in nats.

    A sum, not a mean: the loop divides by the number of targets of the whole step, so that any
    split into micro-batches and processes, with any padding, gives the same gradient.
    """

    def __init__(self, model: CausalLM | RecursiveLM, *, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.hidden = torch.compile(model.hidden) if compiled else model.hidden

    def forward(
        self, inputs_bt: Tensor, targets_bt: Tensor, starts_bt: Tensor | None = None
    ) -> Tensor:
        hidden = self.hidden(inputs_bt, starts_bt=starts_bt)
        return linear_cross_entropy(hidden, self.model.head.weight, targets_bt)
