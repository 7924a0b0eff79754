"""An exponential moving average of the weights: what is evaluated and kept, not what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from thimble.training import sharding


class EMA:
    """``average <- decay x average + (1 - decay) x weight`` after every update (Polyak & Juditsky
    1992; TRM has decay 0.999).

    The average begins as the weights are, and is not corrected for it: after n updates the first
    weights have a share of decay^n. Buffers are not averaged, and neither need parameters be that
    few batches touch: only those given are.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight for name, weight in parameters if weight.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        if not self.weights:  # all of them are frozen
            return
        averages = [sharding.local(average) for average in self.averages.values()]
        weights = [sharding.local(weight) for weight in self.weights.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages for weights, and afterwards its own again, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            kept = weight.detach().clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(kept)

    def trained(self) -> dict[str, Tensor]:
        """The weights that are trained, by name."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def resume(self, trained: dict[str, Tensor]) -> None:
        """The model holds the averages; take them over, and put ``trained`` weights in their place.

        Where there are none the averages begin with the model's weights.
        """
        for name, weight in self.weights.items():
            self.averages[name].copy_(weight)
            if trained:
                weight.copy_(trained[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters."""
        return dict(self.averages)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over averages that ``state_dict`` gave; every name must be there, and no other."""
        if state.keys() != self.averages.keys():
            names = sorted(state.keys() ^ self.averages.keys())
            raise KeyError(f"The averages are of another model: {names[0]} ({len(names)} in all).")
        for name, average in self.averages.items():
            average.copy_(state[name])
