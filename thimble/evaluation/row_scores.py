"""Rows through a recursive model: of each, after each supervision step, its loss, how many of its
labels are right, and what the halting head says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thimble.objectives.act import Rows
from thimble.objectives.linear_cross_entropy import FORMS, IGNORE, chunk_rows

if TYPE_CHECKING:
    from thimble.models.recursive import RecursiveLM
    from thimble.training.distributed import Processes

Advance = Callable[[float], object]

# What can be kept of every row. preds: the likeliest token at each position after the last step
# (of a conversation where it has a label, else -100; of a puzzle everywhere); preds_by_step: after
# each step; q_halt_logits: one for each step; halting_steps: where the head would stop.
KEPT = (
    *("preds", "preds_by_step", "q_halt_logits", "halting_steps"),
    *("inputs", "labels", "puzzle_identifiers", "examples"),
)


@dataclass(frozen=True)
class Scores:
    """Of N rows after each of S supervision steps, float64 [N, S]: the sum of the losses of a
    row's labels in nats, how many are right, the halting logit (above 0: it would halt); and [N]
    how many there are."""

    nats: np.ndarray
    right: np.ndarray
    q_halt: np.ndarray
    labelled: np.ndarray

    def with_labels(self) -> Scores:
        kept = self.labelled > 0
        return Scores(self.nats[kept], self.right[kept], self.q_halt[kept], self.labelled[kept])

    @property
    def halting(self) -> np.ndarray:
        """The step, from 1, after which the halting head would stop each row: int64 [N]."""
        stops = self.q_halt > 0
        stops[:, -1] = True
        return stops.argmax(1) + 1


@dataclass(frozen=True)
class Run:
    """Rows of at most ``width`` positions through a model, batch by batch."""

    network: RecursiveLM
    form: str
    keep: tuple[str, ...]
    width: int
    pad_id: int
    everywhere: bool  # predictions of all positions are kept, not of labelled ones alone

    @torch.no_grad()
    def __call__(
        self,
        batch: Callable[[np.ndarray], Rows],
        numbers: np.ndarray,
        batch_size: int,
        advance: Advance | None,
        processes: Processes | None,
    ) -> tuple[Scores, dict[str, Tensor]]:
        """``batch(places)`` gives the rows of these places in ``numbers``, and may add others."""
        network, count = self.network, len(numbers)
        device = network.embedding.weight.device
        steps = network.config.halt_max_steps
        # All of it stays on the device until the end: a batch waits for nothing.
        table = torch.zeros(3, count, steps, device=device)
        labelled = np.zeros(count, dtype=np.int64)
        kept: dict[str, list[Tensor]] = {name: [] for name in self.keep}
        rank, ranks = (processes.rank, processes.count) if processes else (0, 1)
        for start in range(rank * batch_size, count, ranks * batch_size):
            places = np.arange(start, min(start + batch_size, count))
            rows = batch(places)
            labelled[places] = (rows.labels != IGNORE).sum(1)[: len(places)].numpy()
            predictions = self._batch(rows, table[:, start : start + len(places)])
            self._keep(kept, rows, predictions, len(places), numbers[places])
            if advance:
                advance(len(places))
        if processes:
            processes.add(table)
            for_all = torch.from_numpy(labelled).to(device)
            labelled = processes.add(for_all).cpu().numpy()
        nats, right, q_halt = table.cpu().numpy().astype(np.float64)
        scores = Scores(nats, right, q_halt, labelled)
        joined = {name: torch.cat(parts) for name, parts in kept.items() if parts}
        mine = np.arange(count) // batch_size % ranks == rank
        if "q_halt_logits" in self.keep:
            joined["q_halt_logits"] = torch.from_numpy(scores.q_halt[mine]).float()
        if "halting_steps" in self.keep:
            joined["halting_steps"] = torch.from_numpy(scores.halting[mine])
        order = torch.from_numpy(np.argsort(numbers[mine], kind="stable"))
        return scores, {name: joined[name][order] for name in self.keep if name in joined}

    def _batch(self, rows: Rows, table: Tensor) -> Tensor | None:
        """Fill ``table`` [3, n, S] for the first n rows; predictions [B, S or 1, T] if wanted."""
        from thimble.training.devices import send

        network = self.network
        # Where the labels are is found on the host, which has them: no waiting for the device.
        where = (rows.labels != IGNORE).nonzero(as_tuple=True)
        sent = (rows.inputs, rows.position, rows.puzzle, *where, rows.labels[where])
        inputs, position, puzzle, row, column, targets = send(
            table.device, *(tensor.numpy() for tensor in sent)
        )
        read_at = position if network.config.causal else None
        weight = network.head.weight.to(network.compute_dtype)
        count = table.shape[1]
        found: list[Tensor] = []
        every = "preds_by_step" in self.keep
        wanted = every or "preds" in self.keep
        puzzles = puzzle if network.prefix else None
        for step, z in enumerate(network.unroll(inputs, puzzles_b=puzzles)):
            hidden = network.tokens(z)
            nats, right = score(hidden[row, column], weight, targets, self.form)
            sums = table.new_zeros(2, len(rows))
            sums.index_add_(1, row, torch.stack([nats, right.float()]))
            table[:2, :, step] = sums[:, :count]
            halting = network.halting_logit(network.q_values(z, read_at))
            table[2, :, step] = halting[:count]
            if wanted and (every or step == table.shape[2] - 1):
                found.append(self._predictions(hidden, weight, row, column))
        return torch.stack(found, 1) if wanted else None

    def _predictions(self, hidden: Tensor, weight: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if self.everywhere:
            return likeliest(hidden.flatten(0, 1), weight).view(hidden.shape[:2])
        made = torch.full(hidden.shape[:2], IGNORE, dtype=torch.int64, device=hidden.device)
        made[row, column] = likeliest(hidden[row, column], weight)
        return made

    def _keep(
        self,
        kept: dict[str, list[Tensor]],
        rows: Rows,
        predictions: Tensor | None,
        count: int,
        numbers: np.ndarray,
    ) -> None:
        tensors = {
            "inputs": (rows.inputs, self.pad_id),
            "labels": (rows.labels, IGNORE),
            "puzzle_identifiers": (rows.puzzle, None),
            "examples": (torch.from_numpy(numbers), None),
        }
        if predictions is not None:
            tensors["preds"] = predictions[:, -1], IGNORE
            tensors["preds_by_step"] = predictions, IGNORE
        for name in kept.keys() & tensors.keys():
            value, fill = tensors[name]
            value = value[:count].to("cpu", torch.int32 if name != "examples" else torch.int64)
            if fill is not None:
                value = F.pad(value, (0, self.width - value.shape[-1]), value=fill)
            kept[name].append(value)


def score(hidden_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, form: str) -> tuple[Tensor, ...]:
    """Of each position its loss in nats (float32 [N]), and whether its target is likelier than
    every other token (bool [N]); a chunk of positions goes through the head at a time."""
    nats = torch.empty(len(targets_n), device=hidden_nd.device)
    right = torch.empty(len(targets_n), dtype=torch.bool, device=hidden_nd.device)
    for part, logits in _logits(hidden_nd, weight_vd):
        index = targets_n[part, None]
        nats[part], _ = FORMS[form](logits, index, False)
        # Itself alone: a tie is not right, and neither is a target that is not a number.
        right[part] = (logits >= logits.gather(1, index)).sum(-1) == 1
    return nats, right


def likeliest(hidden_nd: Tensor, weight_vd: Tensor) -> Tensor:
    """The likeliest token of each position: int64 [N]."""
    found = torch.empty(len(hidden_nd), dtype=torch.int64, device=hidden_nd.device)
    for part, logits in _logits(hidden_nd, weight_vd):
        found[part] = logits.argmax(-1)
    return found


def _logits(hidden_nd: Tensor, weight_vd: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows = chunk_rows(hidden_nd.device, weight_vd.shape[0])
    for start in range(0, len(hidden_nd), rows):
        part = slice(start, start + rows)
        yield part, hidden_nd[part] @ weight_vd.t()
