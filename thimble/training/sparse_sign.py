"""Sign descent for embeddings of which a batch uses a handful: one of each puzzle, say.

Adam would keep two moments for hundreds of thousands of rows and change all of them in every step.
The sign of the gradient needs no state, and rows that are not in the batch are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from thimble.training.distributed import Processes


class SparseSignSGD(torch.optim.Optimizer):
    """``w <- (1 - rate x decay) w - rate x sign(gradient)``, for the rows that were looked up.

    For weights of ``nn.Embedding(..., sparse=True)``. Gradients of a row that was looked up several
    times are added up before the sign is taken; a looked-up row decays even where its gradient is
    zero. Nothing is clipped: the sign has no size. The size of the update is the rate for every
    value (Bernstein et al. 2018, arXiv:1802.04434; HRM and TRM train puzzle embeddings so).

    A step in which a gradient is infinite or NaN, as happens in float16, changes nothing. Of
    several ``processes`` each has the gradients of its own rows, and all apply those of all.
    Nothing here waits for the device.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.processes = processes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            rate = group["lr"] if skip is None else group["lr"] * (1 - skip)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                # A row may be here several times; ``coalesce`` would wait for the device.
                rows, values = weight.grad._indices()[0], weight.grad._values()
                if self.processes is not None and self.processes.count > 1:
                    rows, values = everywhere(rows, values, self.processes)
                step = rate * torch.isfinite(values).all()
                signs = torch.nan_to_num(added_up(rows, values), 0, 0, 0).sign()
                changed = weight[rows] * (1 - step * group["weight_decay"]) - step * signs
                weight.index_copy_(0, rows, changed)


def sparse_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that have sparse gradients, by name."""
    return {
        f"{name}.weight": module.weight  # type: ignore[misc]
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.sparse
    }


def added_up(rows_n: Tensor, values_nd: Tensor) -> Tensor:
    """Of each n the sum of the values of all that have the same row: [N, D]."""
    ordered, order = rows_n.sort(stable=True)
    begins = F.pad(ordered[1:] != ordered[:-1], (1, 0))
    place = torch.empty_like(rows_n).scatter_(0, order, begins.cumsum(0))
    return torch.zeros_like(values_nd).index_add_(0, place, values_nd)[place]


def everywhere(rows_n: Tensor, values_nd: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    """The rows and values of all processes; no backend adds up sparse tensors on every device."""
    missing = processes.most(len(rows_n)) - len(rows_n)
    # Filled up with nothing for a row that is here already.
    rows = torch.cat([rows_n, rows_n[:1].expand(missing)])
    return processes.joined(rows), processes.joined(F.pad(values_nd, (0, 0, 0, missing)))
