"""Recursive models through transformers' own classes; ``import thimble.hub`` registers them.

``generate`` takes for each row as many supervision steps for all its tokens as its halting head
asks for at the end of the prompt, or as ``generate(..., steps=N)`` says. Caches are exact, with a
slot for every block of every call of every step. Called directly the model takes
``halt_max_steps``, the number that losses are measured with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from thimble.errors import ConfigError
from thimble.hub.base import ThimbleCausalLM, ThimbleConfig
from thimble.hub.retention import starts_in, states_in
from thimble.models import interop_recursive
from thimble.models.recursive import Latents, RecursiveLM


class ThimbleRecursiveConfig(ThimbleConfig):
    model_type = interop_recursive.MODEL_TYPE


@dataclass
class RecursiveOutput(CausalLMOutputWithPast):
    """transformers' output, and the supervision steps of each row [B]."""

    steps: Tensor | None = None


Steps = int | Tensor | Literal["halting"] | None


class Slot:
    """One place of transformers' cache, used as a ``KVCache``; ``mask`` as there.

    Without a ``cache`` nothing is kept: it is only there for its mask.
    """

    def __init__(self, cache: Cache | None, index: int, mask: Tensor | None) -> None:
        self.cache, self.index, self.mask = cache, index, mask

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length(self.index)) if self.cache is not None else 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, self.index)
        return keys, values


class ThimbleRecursiveForCausalLM(ThimbleCausalLM):
    """``RecursiveLM`` as transformers wants a model.

    Rows of a batch may be padded on either side (``attention_mask``); those of retention on the
    left, or on the right where nothing follows. Raises ConfigError for a model that sees the
    future: those of puzzles are for ``thimble evaluate``.
    """

    config_class = ThimbleRecursiveConfig
    _supports_sdpa = True
    model: RecursiveLM

    def __init__(self, config: ThimbleRecursiveConfig) -> None:
        super().__init__(config)
        ours = interop_recursive.parse(vars(config), config.name_or_path or "The configuration")
        if not ours.causal:
            raise ConfigError(
                "This model sees the future, so it cannot write (model.causal=false). Models of "
                "puzzles are for `thimble evaluate`."
            )
        self.model = RecursiveLM(ours)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        steps: Steps = None,
        **more: Any,
    ) -> RecursiveOutput:
        """Token ids [B, T] -> float32 logits [B, T, vocabulary], and with ``labels`` [B, T] (-100:
        none) the softmax cross-entropy of each next token.

        ``attention_mask`` [B, past + T] is 0 at padding. ``steps``: supervision steps, of all rows
        or of each [B] (default: halt_max_steps); "halting": as many as the halting head asks for
        at the last position. They are the same for all tokens of a cache. Raises ConfigError beyond
        the context, for a cache or a mask of another kind, and for padding between tokens that
        retention has to remember.
        """
        model = self.model
        model.compute_dtype = self.dtype
        cache, past = self._cache_of(past_key_values, use_cache)
        mask = starts = None
        retains = model.config.mixer == "retention"
        if retains:
            starts = starts_in(attention_mask, past)
        elif attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ConfigError("The attention mask must be one number for each token: [B, T].")
            if not bool(attention_mask.all()):
                mask = visible(attention_mask.bool(), input_ids.shape[1])
                if position_ids is None:
                    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        end = past + input_ids.shape[1]
        context = model.config.max_position_embeddings
        if (
            end > context
            and not retains
            and (position_ids is None or int(position_ids.max()) >= context)
        ):
            raise ConfigError(
                f"The model's context is {context} tokens, and these are {end}: shorten the prompt "
                "or lower max_new_tokens."
            )
        steps = model.config.halt_max_steps if steps is None else steps
        most = steps if isinstance(steps, int) else model.config.halt_max_steps
        if isinstance(steps, Tensor):
            most = int(steps.max())
        count = most * model.config.blocks_per_step
        state: Any = None
        if retains:
            position_ids = None  # they turn by their distances alone
            if cache is not None:
                rows = len(input_ids)
                state = states_in(cache, count, lambda: model.new_state(rows, steps=most))
        elif cache is not None or mask is not None:
            if cache is not None:
                make_room(cache, count)
            state = [Slot(cache, index, mask) for index in range(count)]
        latents = model.unroll(
            input_ids, state, steps=most, positions_bt=position_ids, starts_bt=starts
        )
        hidden, steps_b = self._answers(latents, len(input_ids), most, steps)
        logits, loss = self._logits_and_loss(hidden, logits_to_keep, labels, **more)
        return RecursiveOutput(loss=loss, logits=logits, past_key_values=cache, steps=steps_b)

    def _answers(
        self, latents: Iterable[Latents], rows: int, most: int, steps: Steps
    ) -> tuple[Tensor, Tensor]:
        """z_H of each row after its own number of steps, and those numbers [B]."""
        ends = steps if isinstance(steps, Tensor) else torch.full((rows,), most, device=self.device)
        hidden = torch.empty(0)
        for step, z in enumerate(latents, start=1):
            now = self.model.tokens(z)
            hidden = now if step == 1 else torch.where((ends >= step)[:, None, None], now, hidden)
            if steps == "halting":
                last = torch.full_like(ends, now.shape[1] - 1)
                stops = self.model.halting_logit(self.model.q_values(z, last)) > 0
                ends = torch.where(stops, ends.clamp(max=step), ends)
                if bool((ends <= step).all()):
                    break
        return hidden, ends

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        parent: Any = super()  # whose stub asks for another self
        inputs = parent.prepare_inputs_for_generation(*args, **kwargs)
        return {"steps": "halting"} | {k: v for k, v in inputs.items() if v is not None}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **more: Any
    ) -> dict[str, Any]:
        """After the prompt the number of steps is settled."""
        kept = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **more)
        return kept | {"steps": outputs.steps}


def visible(tokens_bs: Tensor, time: int) -> Tensor:
    """What the last ``time`` of S positions see where only some are tokens: bool [B, 1, T, S].

    Padding sees itself, since a softmax over nothing would be NaN.
    """
    positions = tokens_bs.shape[1]
    past = positions - time
    earlier = torch.ones(time, positions, dtype=torch.bool, device=tokens_bs.device).tril(past)
    return ((earlier & tokens_bs[:, None]) | (earlier & earlier.triu(past)))[:, None]


def make_room(cache: Cache, count: int) -> None:
    """Give an empty ``cache`` as many slots as the recursion needs; transformers counts blocks."""
    past = cache.get_seq_length()
    if not isinstance(cache, DynamicCache) or (past and cache.get_seq_length(count - 1) != past):
        raise ConfigError(
            "A recursive model needs a DynamicCache, filled with the same number of steps."
        )
    cache.layers.extend(DynamicLayer() for _ in range(count - len(cache.layers)))
