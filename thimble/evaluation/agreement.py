"""How much a student is like its teacher, and whether it is as sure as it is right."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thimble.objectives.linear_cross_entropy import IGNORE, chunk_rows, right
from thimble.objectives.sparse_kl import Teacher, bucket_divergence
from thimble.objectives.sparse_targets import SparseTargets, beside

BINS = 10
BIN_NAMES = [f"bin_{number}" for number in range(BINS)]
TEACHER_NAMES = ["teacher_kl", "teacher_agreement"]


@torch.no_grad()
def position_scores(
    hidden: Tensor, weight_vd: Tensor, targets: Tensor, teacher: SparseTargets | None
) -> Tensor:
    """Of each position: cross-entropy in nats; whether the target is the likeliest token and among
    the five likeliest; how much surer the likeliest token is than right, in the bin of its
    probability, 0 in the other ``BINS``; and with a ``teacher`` the KL from it at temperature 1, in
    nats over its buckets, and whether both have the same likeliest token.

    hidden [..., D], weight [V, D], targets [...] with -100 for what is not counted (0 in all).
    """
    flat, label = hidden.flatten(0, -2), targets.flatten()
    weight = weight_vd.to(hidden.dtype)
    rows = chunk_rows(hidden.device, len(weight))
    found = []
    for start in range(0, len(flat), rows):
        here = slice(start, start + rows)
        logits = (flat[here] @ weight.t()).float()
        accuracies = right(logits, label[here])
        log_q = torch.log_softmax(logits, dim=-1)
        del logits
        index = label[here].clamp(min=0)
        columns = [-log_q.gather(1, index[:, None])[:, 0], *accuracies]
        sure, likeliest = log_q.max(-1)
        sure = sure.exp()
        surplus = sure - (likeliest == index).float()
        number = (sure * BINS).long().clamp(max=BINS - 1)
        columns += [surplus * (number == each) for each in range(BINS)]
        if teacher is not None:
            ids = torch.arange(len(flat), device=flat.device)[here]
            part = teacher.select(ids)
            tokens = part.indices.long()
            chosen, _, rest = beside(log_q, tokens)
            log_p, log_tail = part.at(1.0)
            said = Teacher(tokens, log_p, log_tail, None)
            columns.append(bucket_divergence(chosen, rest, said, reverse=False)[0])
            columns.append((likeliest == tokens[:, 0]).float())
        counted = (label[here] != IGNORE)[:, None]
        found.append(torch.stack(columns, dim=-1) * counted)
    return torch.cat(found).view(*targets.shape, -1)


def names(*, teacher: bool) -> list[str]:
    """What the columns after the first are called."""
    return ["top1_accuracy", "top5_accuracy", *BIN_NAMES] + (TEACHER_NAMES if teacher else [])


def calibration_error(means: Mapping[str, float]) -> float:
    """The expected calibration error (Guo et al. 2017, arXiv:1706.04599) of the likeliest token,
    out of the bins' means over all positions: 0 where it is as often right as it is probable."""
    return sum(abs(means[name]) for name in BIN_NAMES)
