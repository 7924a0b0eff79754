"""Who takes part in ``distill.py``'s first table: the loss as one writes it, and thimble's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from thimble.objectives.sparse_kl import linear_sparse_kl
from thimble.objectives.sparse_targets import SparseTargets

ALPHA, TEMPERATURE, TOKENS = 0.5, 2.0, 64
# Copies of positions x vocabulary in float32 that the plain form is taken to need: logits, two
# softmaxes, gradients. What would need more than this machine has is not tried.
COPIES = 7


class Problem:
    """A student's last hidden states [N, D] and its head [V, D], and a teacher's targets."""

    def __init__(
        self, positions: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(positions, width, generator=draw)
        head = torch.randn(vocabulary, width, generator=draw) * width**-0.5
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.head = head.to(device).requires_grad_()
        self.labels = torch.randint(vocabulary, (positions,), generator=draw).to(device)
        # Any tokens will do that are none twice, likelier ones first, nine tenths in all.
        first = torch.randint(vocabulary - TOKENS, (positions, 1), generator=draw)
        indices = (first + torch.arange(TOKENS)).to(device)
        falling = torch.randn(positions, TOKENS, generator=draw).sort(descending=True).values
        log_probs = (torch.log_softmax(3 * falling, -1) + torch.tensor(0.9).log()).to(device)
        tail = torch.full((positions, 2), 0.1).log().to(device)
        self.targets = SparseTargets(indices, log_probs, tail, (1.0, TEMPERATURE))

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden.grad is not None
        assert self.head.grad is not None
        found = self.hidden.grad, self.head.grad
        self.hidden.grad = self.head.grad = None
        return found


def plain(problem: Problem) -> Tensor:
    """Logits, their softmax, the teacher's tokens gathered from it, and what is left as the rest's
    probability: as the loss is written where memory does not matter."""
    logits = (problem.hidden @ problem.head.to(problem.hidden.dtype).t()).float()
    cross_entropy = F.cross_entropy(logits, problem.labels, reduction="sum")
    q = torch.softmax(logits / TEMPERATURE, dim=-1).gather(-1, problem.targets.indices)
    rest = (1 - q.sum(-1)).clamp(min=1e-12)
    log_p, log_tail = problem.targets.at(TEMPERATURE)
    divergence = (log_p.exp() * (log_p - q.log())).sum()
    divergence = divergence + (log_tail.exp() * (log_tail - rest.log())).sum()
    return ALPHA * cross_entropy + (1 - ALPHA) * TEMPERATURE**2 * divergence


def fused(problem: Problem) -> Tensor:
    return linear_sparse_kl(
        problem.hidden,
        problem.head,
        problem.labels,
        problem.targets,
        alpha=ALPHA,
        temperature=TEMPERATURE,
    ).loss


WAYS: dict[str, Callable[[Problem], Tensor]] = {"plain": plain, "fused": fused}


def check(width: int, device: torch.device) -> str:
    """One line on how near the two are in float32. Raises RuntimeError when they are not the same
    loss."""
    problem = Problem(300, 5000, width, torch.float32, device)
    losses, gradients = [], []
    for way in (plain, fused):
        loss = way(problem)
        loss.backward()
        losses.append(loss.item())
        gradients.append(problem.gradients())
    apart = abs(losses[0] / losses[1] - 1)
    slopes = [
        float((mine - theirs).norm() / theirs.norm())
        for theirs, mine in zip(*gradients, strict=True)
    ]
    if not (apart < 1e-5 and max(slopes) < 1e-5):
        raise RuntimeError(f"The two losses differ: {apart}, {slopes}; times mean nothing.")
    return (
        f"the same loss to {apart:.0e}, gradients of hidden states and head to "
        f"{slopes[0]:.0e} and {slopes[1]:.0e} of their norm, in float32"
    )


def needed_bytes(positions: int, vocabulary: int) -> int:
    """What the plain form takes at least."""
    return 4 * COPIES * positions * vocabulary


def seconds(way: str, problem: Problem, device: torch.device) -> float:
    """Forward and backward, once."""
    synchronize(device)
    started = time.perf_counter()
    WAYS[way](problem).backward()
    synchronize(device)
    took = time.perf_counter() - started
    problem.gradients()
    return took


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
