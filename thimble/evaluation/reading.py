"""A model that reads on: a student or its teacher over a state that keeps what was read.

Rows of equal length are read in pieces, so that a long context needs no more room for hidden states
than a short one, and decoded from the state alone, as in generating.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thimble.evaluation.perplexity import BATCH_TOKENS
from thimble.generation.model import Model
from thimble.generation.sampling import Network
from thimble.models.retention import RetentionState
from thimble.teachers.models import LoadedModel, text_config

# What a state was before something was read that is to be forgotten.
Mark = Any


class Reader(Protocol):
    """``made_for``: the positions it was trained to tell apart, None where it has no end to them;
    ``most``: those it reads at all."""

    device: torch.device
    made_for: int | None
    most: float

    def begin(self, batch: int, capacity: int) -> Any:
        """The state of ``batch`` rows of which nothing has been read, at most ``capacity`` will."""

    def read(self, ids_bt: Tensor, state: Any) -> Tensor:
        """float32 logits [B, V] after the last of the ids [B, T], which ``state`` then has read."""

    def mark(self, state: Any) -> Mark: ...
    def back(self, state: Any, mark: Mark) -> None:
        """Forget what was read since ``mark``."""

    def state_bytes(self, state: Any) -> int:
        """Of the tensors that a state keeps for what was read so far."""


class StudentReader:
    """A model of ours, in float32 as it generates."""

    def __init__(self, model: Model) -> None:
        self.network: Network = model.network
        self.device = model.device
        endless = model.config.mixer == "retention"
        self.made_for = None if endless else model.config.max_position_embeddings
        self.most = math.inf if endless else model.config.max_position_embeddings

    def begin(self, batch: int, capacity: int) -> Any:
        return self.network.new_state(batch, capacity)

    def read(self, ids_bt: Tensor, state: Any) -> Tensor:
        return self.network.head(self.network.hidden(ids_bt, state)[:, -1]).float()

    def mark(self, state: Any) -> Mark:
        # Retention makes a new memory at each step; a cache is only longer.
        return [(getattr(layer, "memory", None), layer.length) for layer in state]

    def back(self, state: Any, mark: Mark) -> None:
        for layer, (memory, length) in zip(state, mark, strict=True):
            layer.length = length
            if isinstance(layer, RetentionState):
                layer.memory = memory

    def state_bytes(self, state: Any) -> int:
        return sum(
            layer.memory.nbytes
            if isinstance(layer, RetentionState)
            else 2 * layer.keys[:, :, : layer.length].nbytes
            for layer in state
        )


class TeacherReader:
    """A causal language model of transformers, over its cache of keys and values."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.device = loaded, loaded.head.device
        config = text_config(loaded.model)
        self.made_for = loaded.context
        # Rotary positions go on; of learned ones there are no more.
        rotary = any(getattr(config, n, None) for n in ("rope_parameters", "rope_theta"))
        self.most = math.inf if rotary or self.made_for is None else self.made_for

    def begin(self, batch: int, capacity: int) -> Any:
        from transformers import DynamicCache

        config: Any = self.loaded.model.config
        return DynamicCache(config=config)

    def read(self, ids_bt: Tensor, state: Any) -> Tensor:
        loaded = self.loaded
        found = loaded.decoder(input_ids=ids_bt, past_key_values=state, use_cache=True)
        logits = (found.last_hidden_state[:, -1] @ loaded.head.t()).float()
        return logits if loaded.finish is None else loaded.finish(logits)

    def mark(self, state: Any) -> Mark:
        return copy.deepcopy(state.layers)  # a window that slid cannot be cropped

    def back(self, state: Any, mark: Mark) -> None:
        state.layers = mark

    def state_bytes(self, state: Any) -> int:
        kept = (tensor for layer in state.layers for tensor in vars(layer).values())
        return sum(tensor.nbytes for tensor in kept if isinstance(tensor, Tensor))


@dataclass(frozen=True)
class Answered:
    """Of each row the ids generated [B, W], and of the right ones what the model said of them:
    nats of all together [B], logits of the first [B, V]."""

    generated: Tensor
    nats: Tensor
    first: Tensor


def prompt(reader: Reader, ids_bt: Tensor, state: Any) -> Tensor:
    """Logits after a context of any length, read in pieces of ``BATCH_TOKENS`` at most."""
    logits = None
    for piece in ids_bt.split(max(BATCH_TOKENS // len(ids_bt), 1), dim=1):
        logits = reader.read(piece, state)
    assert logits is not None
    return logits


@torch.inference_mode()
def answer(reader: Reader, context_bt: Tensor, right_bw: Tensor) -> Answered:
    """Read contexts [B, T], generate W tokens greedily, and say how likely ``right`` [B, W] is."""
    width = right_bw.shape[1]
    state = reader.begin(len(context_bt), context_bt.shape[1] + width)
    first = prompt(reader, context_bt, state)
    here = reader.mark(state)
    generated = list(greedily(reader, first, state, width))
    reader.back(state, here)
    logits, nats = first, first.new_zeros(len(first))
    for place in range(width):
        wanted = right_bw[:, place, None]
        nats -= torch.log_softmax(logits, -1).gather(1, wanted)[:, 0]
        if place + 1 < width:
            logits = reader.read(wanted, state)
    return Answered(torch.stack(generated, dim=1), nats, first)


def greedily(reader: Reader, logits_bv: Tensor, state: Any, count: int) -> Iterator[Tensor]:
    """``count`` ids [B], each the likeliest after those before."""
    for place in range(count):
        chosen = logits_bv.argmax(-1)
        yield chosen
        if place + 1 < count:
            logits_bv = reader.read(chosen[:, None], state)


def readers(model: Model, teacher: LoadedModel | None) -> dict[str, Reader]:
    """Who is measured, by name."""
    found: dict[str, Reader] = {"student": StudentReader(model)}
    if teacher is not None:
        found["teacher"] = TeacherReader(teacher)
    return found


def doubling(first: int, last: int) -> Sequence[int]:
    """``first``, twice as much, and so on, to ``last``."""
    found = [max(first, 1)]
    while 2 * found[-1] <= last:
        found.append(2 * found[-1])
    return found
