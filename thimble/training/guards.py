"""Guards: what stops a run for its own good, with a reason and without touching its checkpoints.

NaN, Inf and an exploding gradient are found on the device, in the step itself: the update of that
step and of every later one is skipped there, so the host may learn of it a little later and the
weights are still the last good ones. A plateau is found on the host, at the logging steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thimble.training.checkpoint import TrainerState

SMOOTHING = 0.9  # of the logged losses; each is already the mean of log_every steps


@dataclass(frozen=True)
class Verdict:
    """``kind`` is ``nan``, ``explosion``, ``plateau`` or ``out_of_memory``."""

    kind: str
    step: int
    reason: str
    advice: str


class StepGuard:
    """Watches loss and gradient norm of every step without a synchronisation with the host.

    ``tripped`` [3] on the device holds the step, loss and norm of the first bad step; the step is
    -1 as long as there is none.
    """

    def __init__(self, device: torch.device, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm
        self.tripped = torch.tensor([-1.0, 0.0, 0.0], device=device)
        # Pinned, so that the copy is queued behind the step instead of waiting for it.
        self.seen = torch.full((3,), -1.0, pin_memory=device.type == "cuda")

    def observe(self, step: int, loss: Tensor, norm: Tensor, half: bool) -> Tensor:
        """Returns a float32 scalar: 1 when this update must be skipped (an optimizer's found_inf).

        ``half``: under a gradient scaler an infinite norm is no failure, it lowers the scale.
        """
        bad = ~torch.isfinite(loss) | (norm > self.max_grad_norm)
        if half:
            bad &= ~torch.isinf(norm)
        else:
            bad |= ~torch.isfinite(norm)
        now = torch.stack([torch.full_like(loss, step), loss, norm.to(loss.dtype)])
        self.tripped = torch.where((self.tripped[0] < 0) & bad, now, self.tripped)
        self.seen.copy_(self.tripped, non_blocking=True)
        return (self.tripped[0] >= 0).float()

    def verdict(self, *, synchronize: bool = False) -> Verdict | None:
        """What the host knows by now; with ``synchronize`` all that has been computed."""
        step, loss, norm = (self.tripped if synchronize else self.seen).tolist()
        if step < 0:
            return None
        if math.isfinite(loss) and math.isfinite(norm):
            return Verdict(
                "explosion",
                int(step),
                f"the gradient norm {norm:,.0f} is above {self.max_grad_norm:,.0f}",
                "Lower optim.learning_rate or lengthen optim.warmup_steps.",
            )
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        return Verdict(
            "nan", int(step), what, "Lower optim.learning_rate or lengthen optim.warmup_steps."
        )


def observe_loss(
    state: TrainerState, loss: float, log_every: int, plateau_steps: int
) -> Verdict | None:
    """Update the smoothed loss in ``state`` by a logged one; a Verdict when it no longer falls."""
    before = state.smoothed_loss
    # A run that logs rarely is smoothed less: the window stays about a thousand steps.
    weight = SMOOTHING ** (log_every / 100)
    state.smoothed_loss = loss if before is None else weight * before + (1 - weight) * loss
    if state.lowest_loss is None or state.smoothed_loss < state.lowest_loss:
        state.lowest_loss, state.lowest_step = state.smoothed_loss, state.step
    elif state.step - state.lowest_step >= plateau_steps:
        return Verdict(
            "plateau",
            state.step,
            f"the smoothed loss has not fallen below {state.lowest_loss:.4f} since step "
            f"{state.lowest_step:,}",
            "The model may be done: try `thimble accept`; or raise optim.learning_rate.",
        )
    return None


def out_of_memory(step: int, error: BaseException, micro_batch: int, accumulation: int) -> Verdict:
    first_line = (str(error).splitlines() or [""])[0]
    if micro_batch > 1:
        half = f"training.micro_batch_size={micro_batch // 2}"
        advice = (
            f"{half} training.gradient_accumulation_steps={accumulation * 2} is the same training."
        )
    else:
        advice = "Use a smaller model or a shorter training.sequence_length."
    return Verdict("out_of_memory", step, f"out of memory ({first_line[:160]})", advice)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
