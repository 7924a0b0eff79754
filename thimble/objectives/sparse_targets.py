"""What a teacher says about a position, in a few numbers instead of one for every token.

``SparseTargets`` are its K likeliest tokens and the probability of all others together, exact at
every temperature it was asked at: a temperature moves probability between the tokens and the rest,
and the K probabilities alone do not tell how much. ``SampledTargets`` are tokens drawn from its
distribution, whose average is that distribution, tail included (Anshumann et al. 2025,
arXiv:2503.16870).

Both are made from a teacher's hidden states a chunk of positions at a time, so that positions x
vocabulary numbers are never there at once. Shapes: N or ... positions, K tokens, V vocabulary,
M temperatures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thimble.errors import ConfigError
from thimble.objectives.linear_cross_entropy import chunk_rows

# What a model does to its logits [rows, V] after the product with the head: a bias, a scale, a cap.
Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SparseTargets:
    """The likeliest tokens, without repetition, and the rest as one bucket.

    ``log_tail[..., m]`` is the logarithm of the probability of all other tokens together at
    ``temperatures[m]``; -inf where there are none. With it the normaliser of temperature T is known
    without the other tokens: log Z_T = logsumexp(log_probs / T) - log(1 - exp(log_tail)).
    """

    indices: Tensor  # [..., K] int64
    log_probs: Tensor  # [..., K] at temperature 1
    log_tail: Tensor  # [..., M]
    temperatures: tuple[float, ...]

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Logarithms, float32 or wider, of the K probabilities [..., K] and of the rest [...].

        The K+1 probabilities add up to one whatever precision they were kept in. Raises ConfigError
        for a temperature the teacher was not asked at.
        """
        if temperature not in self.temperatures:
            known = ", ".join(f"{t:g}" for t in self.temperatures)
            raise ConfigError(
                f"These targets know the teacher's tail at the temperatures {known}, not at "
                f"{temperature:g}. Use one of them, or ask the teacher again."
            )
        wide = torch.promote_types(self.log_probs.dtype, torch.float32)
        tail = self.log_tail[..., self.temperatures.index(temperature)].to(wide)
        tail = tail.clamp(max=-torch.finfo(tail.dtype).eps)  # K tokens are never nothing at all
        within = torch.log_softmax(self.log_probs.to(wide) / temperature, dim=-1)
        return within + torch.log1p(-tail.exp())[..., None], tail

    def select(self, rows: Tensor) -> SparseTargets:
        """Those of the positions ``rows`` [n], counted over all leading dimensions."""
        return replace(
            self,
            indices=_rows(self.indices, rows),
            log_probs=_rows(self.log_probs, rows),
            log_tail=_rows(self.log_tail, rows),
        )


@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from the teacher at ``temperature``, repetitions allowed.

    ``weights`` are such that their expectation, summed over the draws of a token, is its
    probability: 1 / K each for K draws from the distribution itself.
    """

    indices: Tensor  # [..., K] int64
    weights: Tensor  # [..., K]
    log_probs: Tensor  # [..., K] the teacher's, at ``temperature``
    temperature: float

    def select(self, rows: Tensor) -> SampledTargets:
        """Those of the positions ``rows`` [n], counted over all leading dimensions."""
        return replace(
            self,
            indices=_rows(self.indices, rows),
            weights=_rows(self.weights, rows),
            log_probs=_rows(self.log_probs, rows),
        )


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.flatten(0, -2).index_select(0, rows)


def beside(log_probs_rv: Tensor, index_rk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split distributions into chosen tokens and the rest, in place: log probabilities [rows, V]
    become probabilities with zeros at ``index``.

    Returns the logarithms of the chosen ones [rows, K], the probabilities of the others
    [rows, V], and their sum [rows], which is added up from them: 1 - sum of the chosen would have
    no digits left where the chosen are nearly everything.
    """
    chosen = log_probs_rv.gather(1, index_rk)
    others = log_probs_rv.exp_().scatter_(1, index_rk, 0.0)
    return chosen, others, others.sum(-1)


@torch.no_grad()
def likeliest(
    hidden: Tensor,
    weight_vd: Tensor,
    k: int,
    temperatures: Sequence[float] = (1.0,),
    finish: Finish | None = None,
) -> SparseTargets:
    """The K likeliest tokens of a teacher with final hidden states [..., D] and head [V, D].

    Raises ConfigError for more tokens than there are.
    """
    vocabulary = len(weight_vd)
    if not 1 <= k <= vocabulary:
        raise ConfigError(f"The {k} likeliest of {vocabulary} tokens: give from 1 to {vocabulary}.")
    indices, log_probs, tails = [], [], []
    for logits in _logits(hidden, weight_vd, finish):
        index = logits.topk(k).indices
        of_row = []
        for temperature in temperatures:
            scaled = torch.log_softmax(logits / temperature, dim=-1)
            of_row.append(beside(scaled, index)[2].log())
        indices.append(index)
        log_probs.append(torch.log_softmax(logits, dim=-1).gather(1, index))
        tails.append(torch.stack(of_row, dim=-1))
    shape = hidden.shape[:-1]
    index, logs, rest = (torch.cat(x).unflatten(0, shape) for x in (indices, log_probs, tails))
    return SparseTargets(index, logs, rest, tuple(temperatures))


@torch.no_grad()
def drawn(
    hidden: Tensor,
    weight_vd: Tensor,
    k: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    finish: Finish | None = None,
) -> SampledTargets:
    """K draws from a teacher with final hidden states [..., D] and head [V, D]."""
    if k < 1:
        raise ConfigError(f"{k} draws from a teacher say nothing: give at least 1.")
    indices, log_probs = [], []
    for logits in _logits(hidden, weight_vd, finish):
        scaled = torch.log_softmax(logits / temperature, dim=-1)
        index = torch.multinomial(scaled.exp(), k, replacement=True, generator=generator)
        indices.append(index)
        log_probs.append(scaled.gather(1, index))
    shape = hidden.shape[:-1]
    index, logs = (torch.cat(x).unflatten(0, shape) for x in (indices, log_probs))
    return SampledTargets(index, torch.full_like(logs, 1 / k), logs, temperature)


def _logits(hidden: Tensor, weight_vd: Tensor, finish: Finish | None) -> Iterator[Tensor]:
    """float32 (or wider) logits [rows, V], a chunk of positions at a time."""
    weight = weight_vd.to(hidden.dtype)
    rows = chunk_rows(hidden.device, len(weight))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    for part in hidden.flatten(0, -2).split(rows):
        logits = (part @ weight.t()).to(wide)
        yield logits if finish is None else finish(logits)
