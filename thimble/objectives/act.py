"""Deep supervision with halting: what a recursive model is trained with (TRM, HRM; Graves 2016,
arXiv:1603.08983, for the idea of learning when to stop).

A training step is one supervision step of every row. Rows are at different steps of their
examples: what each has, and its latents, are the ``Carry``. A row whose example has halted is free;
the next call fills free rows with exactly as many new examples as it is given, at most
``carry.free``, so every example is trained on and none is drawn in vain.

    carry = empty_carry(model, batch=32, time=512)
    while examples or not carry.idle:
        new, examples = examples[: carry.free], examples[carry.free :]
        carry, out = act(carry, new, least)
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
    ``puzzle[n]`` identifies the puzzle, for models that have embeddings of puzzles. ``weight[n]``
    is how much the example counts in the loss of the tokens.
    """

    inputs: Tensor  # [N, T] int64
    labels: Tensor  # [N, T] int64
    position: Tensor  # [N] int64
    puzzle: Tensor  # [N] int64
    weight: Tensor  # [N] float32

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
    numbers to divide by: the weight of the labelled tokens (with ``per_sequence`` of the labelled
    rows), and labelled rows; ``continue_loss`` is a sum over these, too, 0 without ``q_continue``.
    A step of several batches adds up all five first. ``metrics`` are sums, too: over what is
    labelled (tokens, tokens_right, rows, rows_right, halts_right), and over the examples that
    halted now (finished, finished_steps; of those with labels finished_labelled, finished_accuracy,
    finished_right, finished_halts_right).
    """

    token_loss: Tensor
    token_count: Tensor
    halt_loss: Tensor
    continue_loss: Tensor
    halt_count: Tensor
    metrics: dict[str, Tensor]

    def mean(self) -> Tensor:
        """The loss of this step alone, each part divided by its count."""
        tokens = self.token_loss / self.token_count.clamp(min=1)
        halting = self.halt_loss + self.continue_loss
        return tokens + HALT_WEIGHT * halting / self.halt_count.clamp(min=1)


def empty_carry(model: RecursiveLM, batch: int, time: int) -> Carry:
    """A carry whose rows are all free, on the model's device."""
    device = model.embedding.weight.device
    rows = Rows(
        inputs=torch.zeros(batch, time, dtype=torch.int64, device=device),
        labels=torch.full((batch, time), IGNORE, device=device),
        position=torch.zeros(batch, dtype=torch.int64, device=device),
        puzzle=torch.zeros(batch, dtype=torch.int64, device=device),
        weight=torch.ones(batch, device=device),
    )
    latents = model.initial_latents(batch, model.prefix + time)
    halted = torch.ones(batch, dtype=torch.bool, device=device)
    return Carry(rows, latents, torch.zeros_like(rows.position), halted)


def resize(carry: Carry, time: int) -> Carry:
    """The carry of ``time`` positions: shorter where no example needs more, or longer.

    What is added is padding. In a causal model padding changes nothing before it, so a batch need
    not be wider than its longest example.
    """
    by = time - carry.rows.inputs.shape[1]
    if not by:
        return carry
    rows = replace(
        carry.rows,
        inputs=F.pad(carry.rows.inputs, (0, by)),
        labels=F.pad(carry.rows.labels, (0, by), value=IGNORE),
        position=carry.rows.position.clamp(max=time - 1),  # of rows that are free, perhaps beyond
    )
    latents = tuple(F.pad(latent, (0, 0, 0, by)) for latent in carry.latents)
    return replace(carry, rows=rows, latents=latents)


def part(carry: Carry, rows: slice) -> Carry:
    """These rows of a carry, as a carry."""
    examples = Rows(**{f.name: getattr(carry.rows, f.name)[rows] for f in fields(Rows)})
    latents = tuple(latent[rows] for latent in carry.latents)
    return Carry(examples, latents, carry.steps[rows], carry.halted[rows])


def join(parts: list[Carry]) -> Carry:
    """The parts of a carry, one after the other."""
    if len(parts) == 1:
        return parts[0]
    examples = {f.name: torch.cat([getattr(p.rows, f.name) for p in parts]) for f in fields(Rows)}
    return Carry(
        Rows(**examples),
        tuple(torch.cat(latents) for latents in zip(*(p.latents for p in parts), strict=True)),
        torch.cat([p.steps for p in parts]),
        torch.cat([p.halted for p in parts]),
    )


def refill(
    carry: Carry, new: Rows | None, model: RecursiveLM, slots: Tensor | None = None
) -> Carry:
    """Put new examples into free rows, first into first; their latents begin anew.

    Rows that stay free lose their labels, so that nothing is counted twice. ``slots``: the numbers
    of the free rows, for who knows them; finding them waits for the device. Raises ValueError for
    more examples than free rows: one of them would have to be dropped.
    """
    if slots is None:
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


def draw_least(
    count: int, max_steps: int, exploration: float, generator: torch.Generator | None = None
) -> Tensor:
    """How many steps each of ``count`` rows has to take before it may halt: int64 [count].

    With probability ``exploration`` a number from 2 to ``max_steps``, else 0. Drawn anew at every
    step, as the published code does, so that later steps are seen in training even by a head that
    would always stop at once.
    """
    explores = torch.rand(count, generator=generator) < exploration
    return explores * torch.randint(2, max(max_steps, 2) + 1, (count,), generator=generator)


def halt(steps: Tensor, logit: Tensor, *, max_steps: int, least: Tensor | None = None) -> Tensor:
    """Which rows stop after ``steps`` supervision steps [B]: bool [B].

    At ``max_steps`` always; before, where the ``halting_logit`` [B] is above 0 and ``least`` [B]
    (``draw_least``) lets it.
    """
    wants = logit > 0
    if least is not None:
        wants &= steps >= least
    return (steps >= max_steps) | wants


class ACT(nn.Module):
    """One supervision step of every row, with its losses.

    ``form`` is the cross-entropy of the tokens: ``softmax`` for text, whose sum over tokens is what
    perplexity is made of; ``stablemax`` as the papers have it for puzzles. With ``per_sequence``
    each row's loss is the mean over its tokens, so that a short answer counts as much as a long one
    (the papers); otherwise every token counts the same (ours, for text).

    The halting logit learns whether the whole answer is right. With ``q_continue`` the head's other
    value learns what going on is worth: the better of both after one step more, or of halting alone
    where that would be the last (HRM's Q-learning). It takes that step without gradients.

    In evaluation mode no row stops before ``halt_max_steps``.
    """

    def __init__(
        self,
        model: RecursiveLM,
        *,
        form: str = "softmax",
        per_sequence: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.form, self.per_sequence = model, form, per_sequence
        self.step = torch.compile(model.supervision_step) if compiled else model.supervision_step

    def forward(
        self,
        carry: Carry,
        new: Rows | None = None,
        least: Tensor | None = None,
        where: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Carry, Output]:
        """Refill, recur once, score, halt. The carry that comes back has no gradients.

        ``new`` holds at most ``carry.free`` examples on the model's device, padded to the carry's
        length; ``least`` [B] is ``draw_least``'s, in training. ``where``: rows and positions of all
        labels, for who knows them; finding them waits for the device. It means that free rows have
        lost their labels already (``refill``). Raises ValueError for more examples than free rows.
        """
        model, config = self.model, self.model.config
        if where is None:
            carry = refill(carry, new, model)
        rows = carry.rows
        x = model.embed(rows.inputs, rows.puzzle if model.prefix else None)
        z = self.step(carry.latents, x)
        read_at = rows.position if config.causal else None
        q = model.q_values(z, read_at)
        q_halt, logit = q[:, 0], model.halting_logit(q.detach())

        labelled = rows.labels != IGNORE
        each = labelled.sum(1)
        has_labels = each > 0
        if where is None:
            row, column = labelled.nonzero(as_tuple=True)
            where = row, column
        row, column = where  # only these reach the head
        scale = rows.weight[row]
        if self.per_sequence:
            scale = scale / each[row]
        token_loss, right = scaled_cross_entropy(
            model.tokens(z)[row, column],
            model.head.weight,
            rows.labels[row, column],
            scale,
            self.form,
        )
        each_right = torch.zeros_like(each).index_add(0, row, right.long())
        exact = (each_right == each) & has_labels
        # A row without labels has nothing to be right about, and teaches no halting.
        halting = F.binary_cross_entropy_with_logits(q_halt, exact.to(q_halt), reduction="none")
        halt_loss = halting.masked_fill(~has_labels, 0).sum()
        steps = carry.steps + (~carry.halted)
        continue_loss = torch.zeros_like(halt_loss)
        if config.q_continue and self.training:
            with torch.no_grad():
                ahead = model.q_values(self.step(z, x), read_at)
                best = torch.where(steps >= config.halt_max_steps, ahead[:, 0], ahead.amax(1))
            worth = F.binary_cross_entropy_with_logits(q[:, 1], best.sigmoid(), reduction="none")
            continue_loss = worth.masked_fill(~has_labels, 0).sum()

        with torch.no_grad():
            stop = steps >= config.halt_max_steps
            if self.training:
                stop = halt(steps, logit, max_steps=config.halt_max_steps, least=least)
            finished = stop & ~carry.halted
            counted = finished & has_labels
            halts_right = ((logit > 0) == exact) & has_labels
            metrics = {
                "tokens": each.sum(),
                "tokens_right": right.sum(),
                "rows": has_labels.sum(),
                "rows_right": exact.sum(),
                "halts_right": halts_right.sum(),
                "finished": finished.sum(),
                "finished_steps": (steps * finished).sum(),
                "finished_labelled": counted.sum(),
                "finished_accuracy": (each_right / each.clamp(min=1) * counted).sum(),
                "finished_right": (exact & counted).sum(),
                "finished_halts_right": (halts_right & counted).sum(),
            }
        latents = tuple(latent.detach() for latent in z)
        after = Carry(rows, latents, steps, carry.halted | finished)
        # Of free rows, too: they have no labels.
        token_count = (rows.weight * (has_labels if self.per_sequence else each)).sum()
        return after, Output(
            token_loss, token_count, halt_loss, continue_loss, metrics["rows"], metrics
        )
