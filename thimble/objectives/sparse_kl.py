"""Head, cross-entropy and divergence from a teacher as one step that never holds all logits.

    loss = alpha * CE(softmax(z), label) + (1 - alpha) * T^2 * KL(p_T, softmax(z / T))

The teacher's distribution p_T is known in K+1 buckets: its K likeliest tokens, and all others
together. The student is put into the same buckets at the same temperature, so a student that equals
its teacher has neither loss nor gradient, at every T. Towards the logits y = z / T the divergence
has the gradient

    q_j - p_j            of a token with a bucket of its own
    (q_rest - p_rest) * q_j / q_rest    of every other: the tail is matched in mass, not in shape

and T^2 keeps its size against the cross-entropy's as T grows (Hinton et al. 2015,
arXiv:1503.02531). As in ``linear_cross_entropy`` each chunk of positions gives its losses and at
once its share of the gradients; positions without a label never reach the head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thimble.errors import ConfigError
from thimble.objectives.linear_cross_entropy import IGNORE, chunk_rows
from thimble.objectives.sparse_targets import SampledTargets, SparseTargets

# Tails smaller than these are taken for these, so that their logarithms are finite: a teacher's has
# its logarithm from a float32 probability, and a student's is divided by.
LEAST_LOG_TAIL, LEAST_TAIL = -104.0, 1e-30
# Logits of a CPU's losses at a time: 2 MB, what its cores have to themselves.
CACHED = 1 << 19


class Distilled(NamedTuple):
    """Sums over the labelled positions: scalars in nats. Only ``loss`` has a gradient."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor  # without T^2


class Teacher(NamedTuple):
    """Targets of n positions at the temperature of the loss: buckets, or draws with weights."""

    tokens: Tensor  # [n, K]
    log_probs: Tensor  # [n, K]
    log_tail: Tensor | None  # [n]
    weights: Tensor | None  # [n, K]

    def rows(self, start: int, end: int) -> Teacher:
        return Teacher(*(None if x is None else x[start:end] for x in self))  # type: ignore[arg-type]


def bucket_divergence(
    chosen_rk: Tensor, rest_r: Tensor, teacher: Teacher, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence between K+1 buckets [rows], and its slopes towards the logits of the K tokens
    [rows, K] and, together, of the others [rows].

    The student's buckets are given as logarithms of K probabilities and as the rest's probability.
    """
    assert teacher.log_tail is not None
    log_q = torch.cat([chosen_rk, rest_r.clamp(min=LEAST_TAIL).log()[:, None]], dim=1)
    q = torch.cat([chosen_rk.exp(), rest_r[:, None]], dim=1)
    log_tail = teacher.log_tail.clamp(min=LEAST_LOG_TAIL)
    log_p = torch.cat([teacher.log_probs, log_tail[:, None]], dim=1)
    if reverse:
        ratio = log_q - log_p
        loss = (q * ratio).sum(-1)
        slope = q * (ratio - loss[:, None])
    else:
        p = log_p.exp()
        loss = (p * (log_p - log_q)).sum(-1)
        slope = q - p
    return loss, slope[:, :-1], slope[:, -1]


def losses(
    logits_rv: Tensor,
    label_r: Tensor,
    teacher: Teacher,
    alpha: float,
    temperature: float,
    reverse: bool,
    wants_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy [rows], divergence [rows] and, when asked for, the gradient of the loss towards
    the logits [rows, V], which are overwritten. Passes over them are what costs time here."""
    label = label_r[:, None]
    q, normaliser = softmax(logits_rv)
    cross_entropy = (normaliser - logits_rv.gather(1, label))[:, 0]
    towards_label = None
    if temperature != 1:
        towards_label = q
        q, normaliser = softmax(logits_rv.div_(temperature))
    # At temperature 1 both losses are made of the same probabilities.
    own = alpha if temperature == 1 else 0.0
    pull = (1 - alpha) * temperature  # T^2, and 1/T of the slope of z / T
    chosen = logits_rv.gather(1, teacher.tokens) - normaliser
    if teacher.weights is not None:
        divergence = (teacher.weights * (teacher.log_probs - chosen)).sum(-1)
        if not wants_grad:
            return cross_entropy, divergence, None
        total = teacher.weights.sum(-1, keepdim=True)
        grad = q.mul_(pull * total + own)
        grad.scatter_add_(1, teacher.tokens, -pull * teacher.weights)
    else:
        others = q.scatter_(1, teacher.tokens, 0.0)
        rest = others.sum(-1)
        divergence, slope, slope_rest = bucket_divergence(chosen, rest, teacher, reverse)
        if not wants_grad:
            return cross_entropy, divergence, None
        grad = others.mul_((pull * slope_rest / rest.clamp(min=LEAST_TAIL) + own)[:, None])
        grad.scatter_(1, teacher.tokens, pull * slope + own * chosen.exp())
    if towards_label is not None and alpha:
        grad.add_(towards_label, alpha=alpha)
    if alpha:
        grad.scatter_add_(1, label, grad.new_full((), -alpha).expand_as(label))
    return cross_entropy, divergence, grad


def softmax(logits_rv: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [rows, V], and [rows, 1] what is subtracted from logits for their logarithms.

    The likeliest token's probability tells the latter with all its digits, and one pass fewer than
    by way of all logarithms.
    """
    q = torch.softmax(logits_rv, dim=-1)
    return q, logits_rv.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log()


def rows_at_once(device: torch.device, vocab_size: int) -> int:
    """Positions that go through the head together. A CPU's products of 256 are nearly as fast as of
    any more; on a GPU half as many as of cross-entropy alone, since there are twice as many numbers
    for each."""
    if device.type == "cpu":
        return 256
    return max(128, chunk_rows(device, vocab_size) // 2)


def rows_of_losses(device: torch.device, vocab_size: int, rows: int) -> int:
    """Of those the ones whose losses are made together: on a CPU few enough to stay in its cache
    from the first pass to the last."""
    if device.type == "cpu":
        return max(1, CACHED // vocab_size)
    return rows


class _LinearSparseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        labels_n: Tensor,
        teacher: Teacher,
        alpha: float,
        temperature: float,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows_at_once(hidden_nd.device, weight_vd.shape[0])
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight = weight_vd.to(hidden_nd.dtype)
        wide = torch.promote_types(hidden_nd.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden_nd) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_vd) if wants_weight else None
        sums = hidden_nd.new_zeros(2, dtype=wide)
        few = rows_of_losses(hidden_nd.device, weight_vd.shape[0], rows)
        # One place for all chunks: fresh memory costs a CPU as much as a pass over it.
        held = weight.new_empty(min(rows, len(hidden_nd)), len(weight))
        for start in range(0, len(hidden_nd), rows):
            hidden = hidden_nd[start : start + rows]
            logits = torch.mm(hidden, weight.t(), out=held[: len(hidden)])
            for first in range(0, len(hidden), few):
                part, at = logits[first : first + few], start + first
                cross_entropy, divergence, grad = losses(
                    part.to(wide),
                    labels_n[at : at + len(part)],
                    teacher.rows(at, at + len(part)),
                    alpha,
                    temperature,
                    reverse,
                    wants_hidden or wants_weight,
                )
                sums += torch.stack([cross_entropy.sum(), divergence.sum()])
                if grad is not None:
                    part.copy_(grad)
                del grad  # before the next ones are there
            # Now they hold the gradient towards themselves, if one is wanted.
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                if grad_weight.dtype == logits.dtype:
                    grad_weight.addmm_(logits.t(), hidden)
                else:
                    grad_weight += logits.t() @ hidden
        ctx.grads = [grad_hidden, grad_weight]
        loss = alpha * sums[0] + (1 - alpha) * temperature**2 * sums[1]
        parts = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    def backward(ctx, grad_output: Tensor, *_: Tensor):
        # Scaled in place, once: a second copy of the head's gradient would be the largest thing.
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, (
            "the gradients were computed in the forward pass, for one backward"
        )
        for grad in grads:
            if grad is not None:
                grad.mul_(grad_output)
        return *grads, None, None, None, None, None


def linear_sparse_kl(
    hidden: Tensor,
    weight_vd: Tensor,
    labels: Tensor,
    targets: SparseTargets | SampledTargets,
    *,
    alpha: float,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Distilled:
    """Sum over positions of ``alpha`` x cross-entropy + (1 - ``alpha``) x T^2 x divergence.

    hidden [..., D], weight [V, D], labels [...] int64 with -100 where there is nothing to learn,
    targets of the same positions. The divergence is KL(teacher, student), with ``reverse``
    KL(student, teacher). The gradients are computed in the forward pass.

    For ``SampledTargets`` the divergence is the estimate sum of weight x (log p - log q) over the
    draws. Its mean over draws, and that of its gradient, are those of the whole distribution; a
    single one can be negative.

    Raises ConfigError for a temperature the targets are not of, and for the reverse divergence of
    draws, which only the student's own draws could estimate.
    """
    rows = (labels.flatten() != IGNORE).nonzero()[:, 0]
    chosen = targets.select(rows)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tokens = chosen.indices.long()
    if isinstance(chosen, SparseTargets):
        log_probs, log_tail = chosen.at(temperature)
        teacher = Teacher(tokens, log_probs.to(wide), log_tail.to(wide), None)
    else:
        if reverse:
            raise ConfigError("Draws from the teacher cannot estimate the reverse divergence.")
        if temperature != chosen.temperature:
            raise ConfigError(
                f"These targets were drawn at temperature {chosen.temperature:g}, the loss is at "
                f"{temperature:g}: they must be the same."
            )
        teacher = Teacher(tokens, chosen.log_probs.to(wide), None, chosen.weights.to(wide))
    flat, label = hidden.flatten(0, -2), labels.flatten()
    return Distilled(
        *_LinearSparseKL.apply(
            flat.index_select(0, rows),
            weight_vd,
            label.index_select(0, rows),
            teacher,
            alpha,
            temperature,
            reverse,
        )
    )
