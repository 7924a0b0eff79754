"""AdamW, Muon with AdamW for what is no matrix, Adam-atan2; the warm-up and cosine schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thimble.config.schema import OptimConfig
from thimble.models.layers import Linear
from thimble.training import sharding
from thimble.training.sparse_sign import SparseSignSGD, sparse_weights

if TYPE_CHECKING:
    from thimble.training.distributed import Processes

# A quintic whose repeated application drives every singular value into about 0.7 .. 1.2 (Jordan et
# al. 2024, https://kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def schedule(config: OptimConfig, step: int, total_steps: int, share: float = 0.0) -> float:
    """What the update number ``step`` (from 0) multiplies the learning rate by: linear warm-up,
    ``plateau_steps`` at the full rate, then cosine to ``min_lr_ratio``.

    The first update has 1 / warm-up, not zero; the last exactly ``min_lr_ratio``. ``share``: of the
    data that has been given out, for a run that ends with them; whichever is further counts.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    level = config.warmup_steps + config.plateau_steps
    last = max(total_steps - 1 - level, 1)
    done = min(max((step - level) / last, share, 0.0), 1.0)
    floor = config.min_lr_ratio
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def make_sparse_optimizer(
    model: nn.Module, config: OptimConfig, processes: Processes | None = None
) -> SparseSignSGD | None:
    """For the embeddings with sparse gradients, which ``make_optimizer`` leaves out; None when
    there are none."""
    weights = list(sparse_weights(model).values())
    if not weights:
        return None
    rate, decay = config.puzzle_emb_lr, config.puzzle_emb_weight_decay
    return SparseSignSGD(weights, rate, decay, processes)


def freeze(model: nn.Module) -> None:
    """Nothing but embeddings with sparse gradients is trained from now on."""
    model.requires_grad_(False)
    for weight in sparse_weights(model).values():
        weight.requires_grad_(True)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW, Adam-atan2, or Muon for the matrices. Matrices decay; norms and the embedding do
    not.

    A norm's scale has no direction to shrink, and a rare token's embedding, seldom updated, would
    fade between its occurrences. Each group carries ``names`` so that saved state can be matched.
    Embeddings with sparse gradients are left out: ``sparse_sign.SparseSignSGD`` is for them.
    """
    matrices: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    vocabulary = {id(m.weight) for m in embeddings}
    sparse = {id(weight) for weight in sparse_weights(model).values()}
    if isinstance(head := getattr(model, "head", None), nn.Linear):
        vocabulary.add(id(head.weight))
    for name, parameter in model.named_parameters():
        if id(parameter) in sparse:
            continue
        matrix = parameter.dim() >= 2 and id(parameter) not in vocabulary
        (matrices if matrix else others).append((name, parameter))
    ratio = config.adamw_lr_ratio if config.name == "muon" else 1.0
    groups = [
        {
            "params": [parameter for _, parameter in members],
            "weight_decay": weight_decay,
            "lr_ratio": lr_ratio,
            "names": [name for name, _ in members],
        }
        for members, weight_decay, lr_ratio in (
            (matrices, config.weight_decay, 1.0),
            (others, 0.0, ratio),
        )
    ]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.betas[0], config.betas[1]),
    }
    if config.name == "adam_atan2":
        return AdamAtan2(groups, **options)
    options |= {"eps": config.eps, "fused": True}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **options)
    parts = {id(m.weight): m.parts for m in model.modules() if isinstance(m, Linear)}
    return Muon(groups, parts, config.momentum, **options)


class Muon(torch.optim.AdamW):
    """Muon for the first group, AdamW for the others (Jordan et al. 2024).

    The momentum of a matrix, made orthogonal, is its update: every direction it can act in moves
    alike, where Adam's is dominated by few. It is scaled to the size of AdamW's update, so one rate
    and one decay serve both (Liu et al. 2025, arXiv:2502.16982). torch.optim.Muon iterates in
    bfloat16 and matrix by matrix, which is slow on a CPU without that format.

    ``parts``: the heights of the independent maps that share a weight, by the weight's id; each is
    made orthogonal by itself.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        parts: dict[int, tuple[int, ...]],
        momentum: float,
        **adamw: Any,
    ) -> None:
        super().__init__(groups, **adamw)
        self.parts, self.momentum = parts, momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        everything = self.param_groups
        self.param_groups = everything[1:]
        try:
            super().step()
        finally:
            self.param_groups = everything
        group = everything[0]
        skip = getattr(self, "found_inf", None)
        rate = group["lr"] if skip is None else group["lr"] * (1 - skip)
        decay = 1 - rate * group["weight_decay"]
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        sharded: list[tuple[Tensor, Tensor]] = []
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
                state["step"] = torch.zeros(())  # unused; AdamW looks for it in what it loads
            kept, grad = state["momentum"], weight.grad
            if skip is not None:
                grad = torch.where(skip > 0, kept, grad)  # a bad gradient leaves no trace
            kept.lerp_(grad, 1 - self.momentum)
            ahead = grad.lerp(kept, self.momentum)
            if hasattr(weight, "full_tensor"):
                # Only whole matrices can be made orthogonal: every process makes each of them.
                ahead = sharding.whole(ahead)
                target = torch.zeros_like(ahead)
                sharded.append((weight, target))
            else:
                target = weight
            heights = self.parts.get(id(weight), (len(weight),))
            for part, update in zip(target.split(heights), ahead.split(heights), strict=True):
                shapes.setdefault((part.shape[0], part.shape[1]), []).append((part, update))
        # Matrices of one shape go through the products together.
        for shape, members in shapes.items():
            updates = orthogonal(torch.stack([update for _, update in members]))
            step = rate * 0.2 * math.sqrt(max(shape))
            for (part, _), update in zip(members, updates, strict=True):
                part.mul_(decay).sub_(update.to(part.dtype) * step)
        for weight, change in sharded:
            weight.mul_(decay).add_(sharding.part(change, weight))


class AdamAtan2(torch.optim.AdamW):
    """AdamW with ``atan2(m, sqrt(v))`` for ``m / (sqrt(v) + eps)`` (Everett et al. 2024,
    arXiv:2407.05872, with a = b = 1).

    Without an eps the update does not depend on the size of the gradient at all, and none is larger
    than pi/2 x rate. Both moments are corrected for their start at zero.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        skip = getattr(self, "found_inf", None)
        taken = 1.0 if skip is None else 1 - skip  # a bad gradient leaves no trace
        for group in self.param_groups:
            given = [weight for weight in group["params"] if weight.grad is not None]
            states = [self.state[weight] for weight in given]
            for weight, state in zip(given, states, strict=True):
                if not state:
                    state["step"] = torch.zeros((), device=weight.device)
                    state["exp_avg"] = torch.zeros_like(weight)
                    state["exp_avg_sq"] = torch.zeros_like(weight)
                state["step"] += taken
            if not given:
                continue
            weights, grads, first, second = (
                [sharding.local(tensor) for tensor in tensors]
                for tensors in (
                    given,
                    [weight.grad for weight in given],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                )
            )
            if skip is not None:
                grads = [grad.masked_fill(skip > 0, 0) for grad in grads]
            rate, (beta1, beta2) = group["lr"] * taken, group["betas"]
            moves = (first, grads, 1 - beta1), (second, torch._foreach_mul(grads, grads), 1 - beta2)
            for moment, target, share in moves:
                change = torch._foreach_sub(target, moment)
                torch._foreach_mul_(change, share * taken)
                torch._foreach_add_(moment, change)
            # atan2 sees only the ratio, so one factor on m corrects both moments.
            counts = [state["step"].clamp(min=1) for state in states]
            ratios = [(1 - beta2**count).sqrt() / (1 - beta1**count) for count in counts]
            updates = torch._foreach_mul(first, ratios)
            for update, size in zip(updates, torch._foreach_sqrt(second), strict=True):
                update.atan2_(size)
            torch._foreach_mul_(updates, rate)
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_sub_(weights, updates)


def orthogonal(x_nij: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, roughly: [N, I, J] -> [N, I, J]."""
    a, b, c = NEWTON_SCHULZ
    x = x_nij.bfloat16() if x_nij.is_cuda else x_nij
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
