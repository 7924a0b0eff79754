"""Sign descent for embeddings of which a batch uses a handful: one of each puzzle, say.

Adam would keep two moments for hundreds of thousands of rows and change all of them in every step.
The sign of the gradient needs no state, and rows that are not in the batch are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class SparseSignSGD(torch.optim.Optimizer):
    """``w <- (1 - rate x decay) w - rate x sign(gradient)``, for the rows that were looked up.

    For weights of ``nn.Embedding(..., sparse=True)``. Gradients of a row that was looked up several
    times are added up before the sign is taken; a looked-up row decays even where its gradient is
    zero. Nothing is clipped: the sign has no size. The size of the update is the rate for every
    value (Bernstein et al. 2018, arXiv:1802.04434; HRM and TRM train puzzle embeddings so).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            rate = group["lr"] if skip is None else group["lr"] * (1 - skip)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = weight.grad.coalesce()  # unique rows, their gradients added up
                rows, values = gradient.indices()[0], gradient.values()
                if skip is not None:
                    values = values.masked_fill(skip > 0, 0)
                kept = weight[rows] * (1 - rate * group["weight_decay"])
                weight[rows] = kept - rate * values.sign()
