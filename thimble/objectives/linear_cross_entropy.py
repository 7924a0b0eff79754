"""Head and cross-entropy as one step that never holds all logits.

The naive form keeps positions x vocabulary float32 logits for the backward pass: 1 GB for 8 x 1024
positions of a 32,000-word vocabulary, and as much again for their gradient. Here each chunk of
positions goes through the head, gives its losses and at once its share of the gradients; only those
stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# Logits held at a time. 2^21 float32 values are 8 MB: small enough to stay in a CPU's cache, where
# a chunk is read several times. A GPU wants larger products.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    elements = CHUNK_ELEMENTS.get(device.type, 1 << 25)
    return max(64, elements // vocab_size)


# Logits [rows, V] and targets [rows, 1] -> float32 losses [rows] and, when asked for, d loss /
# d logits [rows, V].
Form = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def softmax_form(logits: Tensor, index: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of ``softmax(logits)``. Its gradient is softmax - one_hot."""
    # Passes over [rows, V] are what costs time here, so there are as few as possible.
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    losses = -log_p.gather(1, index)[:, 0]
    if not wants_grad:
        return losses, None
    grad = log_p.exp_()
    return losses, grad.scatter_add_(1, index, grad.new_full((), -1.0).expand_as(index))


def stablemax_form(logits: Tensor, index: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of ``s(logits) / sum s(logits)``, s(v) = 1 + v above 0 and 1 / (1 - v) below.

    It grows linearly where the exponential of softmax runs away, so a model cannot lower its loss
    by scaling its logits up until float32 has no digits left for the gradient (Prieto et al. 2025,
    arXiv:2501.04697). Not comparable with a perplexity.
    """
    v = logits.float()
    size = torch.where(v >= 0, v + 1, 1 / (1 - v.clamp(max=0)))
    total, chosen = size.sum(-1, keepdim=True), size.gather(1, index)
    losses = (total.log() - chosen.log())[:, 0]
    if not wants_grad:
        return losses, None
    slope = torch.where(v >= 0, 1.0, size.square())  # ds / dv
    toward = -slope.gather(1, index) / chosen
    return losses, slope.div_(total).scatter_add_(1, index, toward)


FORMS: dict[str, Form] = {"softmax": softmax_form, "stablemax": stablemax_form}


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        targets_n: Tensor,
        form: Form = softmax_form,
        scale_n: Tensor | None = None,
        right_n: Tensor | None = None,
    ) -> Tensor:
        rows = chunk_rows(hidden_nd.device, weight_vd.shape[0])
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight = weight_vd.to(hidden_nd.dtype)
        losses = torch.empty_like(targets_n, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_nd) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_vd) if wants_weight else None
        for start in range(0, hidden_nd.shape[0], rows):
            hidden = hidden_nd[start : start + rows]
            targets = targets_n[start : start + rows]
            ignored = targets == IGNORE
            index = targets.masked_fill(ignored, 0)[:, None]
            logits = hidden @ weight.t()
            if right_n is not None:
                ahead = (logits >= logits.gather(1, index)).sum(-1) - 1
                right_n[start : start + rows] = (ahead == 0) & ~ignored  # -1: the target is NaN
            loss, grad = form(logits, index, wants_hidden or wants_weight)
            del logits
            if scale_n is not None:
                loss = loss * scale_n[start : start + rows]
            losses[start : start + rows] = loss.masked_fill(ignored, 0)
            if grad is None:
                continue
            if scale_n is not None:
                grad *= scale_n[start : start + rows, None]
            # Ignored rows are zeroed in the narrow matrices.
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                rows_out = grad_hidden[start : start + rows]
                torch.mm(grad, weight, out=rows_out)
                rows_out.masked_fill_(ignored[:, None], 0)
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden.masked_fill(ignored[:, None], 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * grad_output
        return grad_hidden, grad_weight, None, None, None, None


def linear_cross_entropy(hidden: Tensor, weight_vd: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of the cross-entropy of ``hidden @ weight.T`` against ``targets``.

    hidden [..., D], weight [V, D], targets [...] int64 with -100 where there is nothing to predict.
    Returns a float32 scalar in nats. The gradients are computed in the forward pass.
    """
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight_vd, targets.flatten())


def scaled_cross_entropy(
    hidden_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, scale_n: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    """``linear_cross_entropy`` with a factor for each position's loss, and softmax or stablemax.

    hidden [N, D], weight [V, D], targets [N], float32 factors [N]. Returns the float32 sum, and of
    each position whether its target is likelier than every other token: bool [N].
    """
    right = torch.zeros_like(targets_n, dtype=torch.bool)
    loss = _LinearCrossEntropy.apply(hidden_nd, weight_vd, targets_n, FORMS[form], scale_n, right)
    return loss, right


def _chunks(hidden: Tensor, weight_vd: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """float32 logits [rows, V] and their targets [rows], a chunk of positions at a time."""
    flat, index = hidden.flatten(0, -2), targets.flatten()
    rows = chunk_rows(hidden.device, weight_vd.shape[0])
    weight = weight_vd.to(hidden.dtype)
    for start in range(0, flat.shape[0], rows):
        yield (flat[start : start + rows] @ weight.t()).float(), index[start : start + rows]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


@torch.no_grad()
def token_losses(hidden: Tensor, weight_vd: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position in nats: float32, shaped like ``targets``, 0 where ignored."""
    losses = [_losses(*chunk) for chunk in _chunks(hidden, weight_vd, targets)]
    return torch.cat(losses).view(targets.shape)


@torch.no_grad()
def token_scores(hidden: Tensor, weight_vd: Tensor, targets: Tensor) -> Tensor:
    """Of each position its cross-entropy in nats, and whether the target is the likeliest token and
    among the five likeliest: float32 ``[..., 3]``, 0 where ignored.

    A target as likely as other tokens counts as behind them, so that a model that tells nothing
    apart is never right.
    """
    scores = []
    for logits, index in _chunks(hidden, weight_vd, targets):
        scores.append(torch.stack([_losses(logits, index), *right(logits, index)], dim=-1))
    return torch.cat(scores).view(*targets.shape, 3)


def right(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [rows, V] and targets [rows] the last two of ``token_scores``: bool [rows]."""
    target = logits.gather(1, index.clamp(min=0)[:, None])
    ahead = (logits >= target).sum(-1) - 1 + logits.shape[-1] * (index == IGNORE)
    return ahead == 0, (ahead >= 0) & (ahead < 5)  # -1: the target is NaN
