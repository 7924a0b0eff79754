"""Saddles: where a run neither falls nor has steep ground around it, and what may be done about it.

The published detector asks for a loss above 100 and a gradient below 0.55, which a run that begins
at ln(vocabulary) never shows. Here both are measured against the run itself: its loss by how much
it has fallen so far, its gradient by how steep the run has been. So the same settings serve every
model, vocabulary and temperature.

Looked at where records are written, on the host; between two of them nothing is waited for.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from thimble.config.schema import SaddleConfig

# How much higher the rate is in the first, second, ... intervention, and for how many steps. From
# the documents, which end there: a run that needs a fifth has another problem.
BOOSTS = ((1.5, 50), (2.0, 50), (2.5, 75), (3.0, 100))
# At a rate below this share of the highest a loss stands still because the schedule wants it to.
COOLED = 0.1


@dataclass
class SaddleState:
    """What the watch remembers; all of it goes into a checkpoint.

    ``first`` and ``lowest``: the loss at the beginning and the lowest since; ``norms``: gradient
    norms of the run, at most ``REMEMBERED``; ``since``: the step from which on the run has been
    stuck, None when it is not; ``until``: the step at which the intervention under way ends;
    ``quiet``: before it nothing is found again.
    """

    first: float | None = None
    window: list[list[float]] = field(default_factory=list)  # [step, loss] of the last steps
    norms: list[float] = field(default_factory=list)
    since: int | None = None
    count: int = 0
    factor: float = 1.0
    until: int = 0
    quiet: int = 0
    before: float | None = None  # the loss when the intervention began


REMEMBERED = 512


class SaddleWatch:
    """``observe`` at each record; ``factor`` is what the learning rate is multiplied by.

    It comes on top of the schedule, so the schedule does not undo it.
    """

    def __init__(self, config: SaddleConfig, state: dict[str, Any] | None = None) -> None:
        self.config = config
        self.state = SaddleState(**(state or {}))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def factor(self, step: int) -> float:
        """For the update number ``step``: 1 outside of interventions."""
        return self.state.factor if step < self.state.until else 1.0

    def observe(
        self, step: int, loss: float, norm: float, *, rate: float = 1.0
    ) -> dict[str, Any] | None:
        """An event for the run's records, or None. ``loss``: mean since the last record; ``norm``:
        the gradient's, before clipping; ``rate``: the schedule's, as a share of its highest."""
        config, state = self.config, self.state
        ended = self._ended(step, loss)
        if state.first is None:
            state.first = loss
        state.norms = [*state.norms, norm][-REMEMBERED:]
        oldest = step - config.patience
        inside = [entry for entry in state.window if entry[0] > oldest]
        before = [entry for entry in state.window if entry[0] <= oldest]
        # One entry from before the window closes it: the fall is measured over all of the patience.
        state.window = [*before[-1:], *inside, [step, loss]]
        if ended:
            return ended
        if not before or step < max(state.until, state.quiet) or rate < COOLED:
            return None
        if not self._stuck(loss, norm):
            return None
        return self._found(step, loss, norm)

    def _stuck(self, loss: float, norm: float) -> bool:
        config, state = self.config, self.state
        assert state.first is not None
        losses = [entry[1] for entry in state.window]
        fallen = state.first - min(losses)  # of the whole run
        fall = losses[0] - statistics.mean(losses[-max(len(losses) // 2, 1) :])
        flat = fall < config.min_improvement * max(fallen, 1e-12)
        steep = sorted(state.norms)[int(0.9 * len(state.norms))]  # not its one steepest step
        gentle = norm < config.grad_norm_ratio * steep
        unfinished = fallen < config.finished * state.first
        return flat and gentle and unfinished

    def _found(self, step: int, loss: float, norm: float) -> dict[str, Any]:
        config, state = self.config, self.state
        event: dict[str, Any] = {
            "event": "saddle",
            "step": step,
            "at_loss": loss,
            "grad_norm": norm,
        }
        state.quiet = step + config.cooldown
        if not config.interventions or state.count >= len(BOOSTS):
            return event | {"intervention": None}
        state.factor, steps = BOOSTS[state.count]
        state.count += 1
        state.until, state.before = step + steps, loss
        state.quiet = state.until + config.cooldown
        return event | {"intervention": {"learning_rate": state.factor, "steps": steps}}

    def _ended(self, step: int, loss: float) -> dict[str, Any] | None:
        state = self.state
        if state.before is None or step < state.until:
            return None
        gained = (state.before - loss) / abs(state.before)
        escaped = gained > self.config.escape
        state.before, state.factor = None, 1.0
        state.window = []  # what is now is judged by itself
        if escaped:
            state.count = 0
        return {
            "event": "saddle_left" if escaped else "saddle_stays",
            "step": step,
            "at_loss": loss,
        }


def in_words(event: dict[str, Any]) -> str:
    """An event of ``observe`` for a person."""
    loss = f"the loss is {event['at_loss']:.3f}"
    if event["event"] == "saddle_left":
        return f"out of the saddle: {loss}"
    if event["event"] == "saddle_stays":
        return f"still at the saddle: {loss}"
    change = event["intervention"]
    done = "saddle.interventions=true would raise the learning rate"
    if change:
        rate, steps = change["learning_rate"], change["steps"]
        done = f"{rate:g} x the learning rate for {steps} steps"
    return f"at a saddle: {loss} and stands still, gradient norm {event['grad_norm']:.2f}; {done}"
