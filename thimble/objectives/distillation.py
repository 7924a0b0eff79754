"""A student's loss: the next token, and the distribution of a teacher beside it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from thimble.config.schema import ObjectiveConfig
from thimble.objectives.next_token import NextToken
from thimble.objectives.sparse_kl import Distilled, linear_sparse_kl
from thimble.objectives.sparse_targets import SampledTargets, SparseTargets

# A temperature that changes takes so many values: a teacher's tail is known at given ones only.
LEVELS = 9


class Blend(NamedTuple):
    """Of a step: weight of the cross-entropy, temperature, direction of the divergence."""

    alpha: float
    temperature: float
    reverse: bool


def blend(config: ObjectiveConfig, step: int, max_steps: int) -> Blend:
    """What the update number ``step`` (from 0) of ``max_steps`` is made with."""
    done = ramp(step, config.alpha_warmup_steps or max_steps)
    start, end = config.distill_alpha_start, config.distill_alpha
    alpha = end if start is None else start + (end - start) * done
    done = ramp(step, config.temperature_warmup_steps or max_steps)
    level = round(done * (LEVELS - 1))
    reverse = config.divergence == "reverse" and step >= config.reverse_warmup_steps
    return Blend(alpha, temperatures(config)[level], reverse)


def ramp(step: int, steps: int) -> float:
    """From 0 at the first of ``steps`` to 1 at the last, and after it."""
    return min(step / max(steps - 1, 1), 1.0)


def temperatures(config: ObjectiveConfig) -> list[float]:
    """Those of a run, level by level, in the order they are come to; all the same without a
    start."""
    start, end = config.temperature_start, config.temperature
    if start is None:
        return [end] * LEVELS
    rise = [start + (end - start) * level / (LEVELS - 1) for level in range(LEVELS)]
    return [*rise[:-1], end]


class Distillation(NextToken):
    """inputs [B, T], targets [B, T] (-100 ignored), the teacher's of the same positions -> sums
    over the positions, see ``sparse_kl``."""

    def forward(  # type: ignore[override]
        self,
        inputs_bt: Tensor,
        targets_bt: Tensor,
        starts_bt: Tensor | None,
        teacher: SparseTargets | SampledTargets,
        blend: Blend,
    ) -> Distilled:
        return linear_sparse_kl(
            self.hidden(inputs_bt, starts_bt=starts_bt),
            self.model.head.weight,
            targets_bt,
            teacher,
            alpha=blend.alpha,
            temperature=blend.temperature,
            reverse=blend.reverse,
        )
