"""What a teacher is asked for, and what every teacher can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from thimble.errors import ConfigError
from thimble.objectives.sparse_targets import SampledTargets, SparseTargets

Targets = SparseTargets | SampledTargets


@dataclass(frozen=True)
class Asked:
    """The ``k`` likeliest tokens with the tail's mass at each of ``temperatures``; or, with
    ``sampled``, ``k`` draws at the only temperature, the same ones for the same ``seed`` and row.

    Raises ConfigError for what cannot be asked.
    """

    k: int = 64
    temperatures: tuple[float, ...] = (1.0,)
    sampled: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"{self.k} tokens of a teacher say nothing: ask for at least 1.")
        good = all(0 < t < math.inf for t in self.temperatures)
        if not good or len(set(self.temperatures)) != len(self.temperatures):
            given = ", ".join(f"{t:g}" for t in self.temperatures)
            raise ConfigError(f"Temperatures are different numbers above 0, not {given}.")
        if not self.temperatures or (self.sampled and len(self.temperatures) > 1):
            raise ConfigError(
                f"Draws are of one temperature, not of {len(self.temperatures)}."
                if self.sampled
                else "At which temperature? Give at least one; 1 is the teacher as it is."
            )

    def check(self, vocab_size: int) -> None:
        """Raise ConfigError for more likeliest tokens than a vocabulary has."""
        if not self.sampled and self.k > vocab_size:
            raise ConfigError(
                f"The {self.k} likeliest of {vocab_size} tokens: ask for at most {vocab_size}."
            )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a cache: JSON values, and the seed only where it matters."""
        kind = {"kind": "drawn", "seed": self.seed} if self.sampled else {"kind": "likeliest"}
        return {**kind, "k": self.k, "temperatures": list(self.temperatures)}


class Teacher(Protocol):
    """What gives the targets of rows.

    ``identity`` says which model it is, as JSON: equal ones give equal targets.
    """

    asked: Asked
    identity: dict[str, Any]

    def targets(
        self, numbers: Sequence[int], inputs: Tensor, starts: Tensor | None = None
    ) -> Targets:
        """The distribution after each input: targets of shape [B, L] on the device of ``inputs``.

        ``numbers`` [B] are those of the rows in the data set, ``inputs`` [B, L] int64 their tokens,
        and ``starts`` [B, L] is true where a document begins that must not see those before it.
        """


def narrowed(targets: Targets, k: int, temperatures: Sequence[float]) -> Targets:
    """The same with fewer tokens, and fewer temperatures, as if no more had been asked for.

    The likeliest stand first, so the others join the tail; any draws are as good as any others.
    """
    if isinstance(targets, SampledTargets):
        share = targets.indices.shape[-1] / k
        return replace(
            targets,
            indices=targets.indices[..., :k],
            weights=targets.weights[..., :k] * share,
            log_probs=targets.log_probs[..., :k],
        )
    if k == targets.indices.shape[-1] and tuple(temperatures) == targets.temperatures:
        return targets
    tails = []
    for temperature in temperatures:
        log_probs, tail = targets.at(temperature)
        tails.append(torch.logsumexp(torch.cat([log_probs[..., k:], tail[..., None]], -1), -1))
    return SparseTargets(
        targets.indices[..., :k],
        targets.log_probs[..., :k],
        torch.stack(tails, -1),
        tuple(temperatures),
    )
