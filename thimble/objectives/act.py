"""Deep supervision with halting: what a recursive model is trained with (TRM, HRM; Graves 2016,
arXiv:1603.08983, for the idea of learning when to stop).

A training step is one supervision step of every row. Rows are at different steps of their
examples: what each has, and its latents, are the ``Carry``. A row whose example has halted is free;
the next call fills free rows with exactly as many new examples as it is given, at most
``carry.free``, so every example is trained on and none is drawn in vain.

    carry = empty_carry(model, batch=32, time=512)
    while examples or not carry.idle:
        new, examples = examples[: carry.free], examples[carry.free :]
        carry, out = act(carry, new, generator)
        out.mean().backward()
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thimble.models.recursive import Latents, RecursiveLM
from thimble.objectives.linear_cross_entropy import IGNORE, scaled_cross_entropy

HALT_WEIGHT = 0.5  # of the halting loss beside the tokens', in both papers


@dataclass(frozen=True)
class Rows:
    """N examples of T positions.

    ``labels[n, t]`` is what the model shall say at position t, -100 where nothing: for text the
    token at t + 1, shifted already. ``position[n]`` is where the halting head reads: for text the
    last position of the prompt, which has seen the whole question and none of the answer.
    ``puzzle[n]`` identifies the puzzle, for models that have embeddings of puzzles.
    """

    inputs: Tensor  # [N, T] int64
    labels: Tensor  # [N, T] int64
    position: Tensor  # [N] int64
    puzzle: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Carry:
    """The batch between two training steps: examples, latents (detached), steps taken, free rows.

    A free row holds no example: it has halted, or has never had one.
    """

    rows: Rows
    latents: Latents
    steps: Tensor  # [B] int64, supervision steps the row's example has had
    halted: Tensor  # [B] bool

    @property
    def free(self) -> int:
        """Rows that wait for an example. (Waits for the device.)"""
        return int(self.halted.sum())

    @property
    def idle(self) -> bool:
        """No row has an example any more."""
        return self.free == len(self.halted)


@dataclass(frozen=True)
class Output:
    """What one training step gave; all of it stays on the device.

    ``token_loss`` and ``halt_loss`` are sums, for which ``token_count`` and ``halt_count`` are the
    numbers to divide by: labelled tokens (with ``per_sequence`` labelled rows), and labelled rows.
    A step of several batches adds up all four first. ``metrics`` are sums, too: over what is
    labelled (tokens, tokens_right, rows, rows_right, halts_right), and over the examples that
    halted now (finished, finished_right, finished_steps).
    """

    token_loss: Tensor
    token_count: Tensor
    halt_loss: Tensor
    halt_count: Tensor
    metrics: dict[str, Tensor]

    def mean(self) -> Tensor:
        """The loss of this step alone, each part divided by its count."""
        tokens = self.token_loss / self.token_count.clamp(min=1)
        return tokens + HALT_WEIGHT * self.halt_loss / self.halt_count.clamp(min=1)


def empty_carry(model: RecursiveLM, batch: int, time: int) -> Carry:
    """A carry whose rows are all free, on the model's device."""
    device = model.embedding.weight.device
    rows = Rows(
        inputs=torch.zeros(batch, time, dtype=torch.int64, device=device),
        labels=torch.full((batch, time), IGNORE, device=device),
        position=torch.zeros(batch, dtype=torch.int64, device=device),
        puzzle=torch.zeros(batch, dtype=torch.int64, device=device),
    )
    latents = model.initial_latents(batch, model.prefix + time)
    halted = torch.ones(batch, dtype=torch.bool, device=device)
    return Carry(rows, latents, torch.zeros_like(rows.position), halted)


def refill(carry: Carry, new: Rows | None, model: RecursiveLM) -> Carry:
    """Put new examples into free rows, first into first; their latents begin anew.

    Rows that stay free lose their labels, so that nothing is counted twice. Raises ValueError for
    more examples than free rows: one of them would have to be dropped.
    """
    slots = carry.halted.nonzero()[:, 0]
    count = len(new) if new is not None else 0
    if count > len(slots):
        raise ValueError(f"{count} new examples for {len(slots)} free rows: give at most those.")
    labels = carry.rows.labels.masked_fill(carry.halted[:, None], IGNORE)
    rows, taken = replace(carry.rows, labels=labels), slots[:count]
    if new is not None:
        merged = {
            field.name: getattr(rows, field.name).index_copy(0, taken, getattr(new, field.name))
            for field in fields(Rows)
        }
        rows = Rows(**merged)
    batch, positions = carry.latents[0].shape[:2]
    begin = model.initial_latents(batch, positions)
    fresh = torch.zeros_like(carry.halted).index_fill(0, taken, True)
    latents = tuple(
        torch.where(fresh[:, None, None], init, latent)
        for init, latent in zip(begin, carry.latents, strict=True)
    )
    return Carry(rows, latents, carry.steps.masked_fill(fresh, 0), carry.halted & ~fresh)


def halt(
    steps: Tensor,
    q_halt: Tensor,
    *,
    max_steps: int,
    exploration: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which rows stop after ``steps`` supervision steps [B]: bool [B].

    At ``max_steps`` always; before, where the halting logit [B] is above 0. With probability
    ``exploration``, drawn anew at every step as the published code does, a row does not stop before
    a number of steps drawn from 2 to ``max_steps``, so that later steps are seen in training even
    by a head that would always stop at once. The draws are made on the generator's device.
    """
    stop = (steps >= max_steps) | (q_halt > 0)
    if exploration > 0 and max_steps > 1:
        device = generator.device if generator is not None else steps.device
        shape = steps.shape
        explores = torch.rand(shape, generator=generator, device=device) < exploration
        least = torch.randint(2, max_steps + 1, shape, generator=generator, device=device)
        stop &= steps >= (explores * least).to(steps.device)
    return stop


class ACT(nn.Module):
    """One supervision step of every row, with its losses.

    ``form`` is the cross-entropy of the tokens: ``softmax`` for text, whose sum over tokens is what
    perplexity is made of; ``stablemax`` as the papers have it for puzzles. With ``per_sequence``
    each row's loss is the mean over its tokens, so that a short answer counts as much as a long one
    (the papers); otherwise every token counts the same (ours, for text).

    In evaluation mode no row stops before ``halt_max_steps``.
    """

    def __init__(
        self, model: RecursiveLM, *, form: str = "softmax", per_sequence: bool = False
    ) -> None:
        super().__init__()
        self.model, self.form, self.per_sequence = model, form, per_sequence

    def forward(
        self, carry: Carry, new: Rows | None = None, generator: torch.Generator | None = None
    ) -> tuple[Carry, Output]:
        """Refill, recur once, score, halt. The carry that comes back has no gradients.

        ``new`` holds at most ``carry.free`` examples on the model's device, padded to the carry's
        length. Raises ValueError for more.
        """
        model, config = self.model, self.model.config
        carry = refill(carry, new, model)
        rows = carry.rows
        x = model.embed(rows.inputs, rows.puzzle if model.prefix else None)
        z = model.supervision_step(carry.latents, x)
        q_halt = model.q_values(z, rows.position if config.causal else None)[:, 0]

        labelled = rows.labels != IGNORE
        each = labelled.sum(1)
        has_labels = each > 0
        row, _ = where = labelled.nonzero(as_tuple=True)  # only these reach the head
        scale = 1 / each[row] if self.per_sequence else torch.ones_like(row, dtype=torch.float32)
        token_loss, right = scaled_cross_entropy(
            model.tokens(z)[where], model.head.weight, rows.labels[where], scale, self.form
        )
        exact = (torch.zeros_like(each).index_add(0, row, right.long()) == each) & has_labels
        # A row without labels has nothing to be right about, and teaches no halting.
        halting = F.binary_cross_entropy_with_logits(q_halt, exact.to(q_halt), reduction="none")
        halt_loss = halting.masked_fill(~has_labels, 0).sum()

        with torch.no_grad():
            steps = carry.steps + (~carry.halted)
            if self.training:
                stop = halt(
                    steps,
                    q_halt,
                    max_steps=config.halt_max_steps,
                    exploration=config.halt_exploration_prob,
                    generator=generator,
                )
            else:
                stop = steps >= config.halt_max_steps
            finished = stop & ~carry.halted
            counted = finished & has_labels
            metrics = {
                "tokens": each.sum(),
                "tokens_right": right.sum(),
                "rows": has_labels.sum(),
                "rows_right": exact.sum(),
                "halts_right": (((q_halt > 0) == exact) & has_labels).sum(),
                "finished": finished.sum(),
                "finished_right": (exact & counted).sum(),
                "finished_steps": steps[finished].sum(),
            }
        latents = tuple(latent.detach() for latent in z)
        after = Carry(rows, latents, steps, carry.halted | finished)
        token_count = metrics["rows"] if self.per_sequence else metrics["tokens"]
        return after, Output(token_loss, token_count, halt_loss, metrics["rows"], metrics)
