"""Retention through transformers' own classes; ``import thimble.hub`` registers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from thimble.errors import ConfigError
from thimble.hub.base import ThimbleCausalLM, ThimbleConfig
from thimble.models import interop_recursive, interop_retention
from thimble.models.causal_lm import CausalLM, LayerState
from thimble.models.retention import RetentionState


class ThimbleRetNetConfig(ThimbleConfig):
    model_type = interop_retention.MODEL_TYPE


class RetentionLayer(CacheLayerMixin):
    """A place of transformers' cache that holds a ``RetentionState``, as large for any length."""

    is_sliding = False

    def __init__(self, state: LayerState) -> None:
        assert isinstance(state, RetentionState)
        super().__init__()
        self.state = state

    def lazy_initialization(self, *_: Any) -> None:
        raise ConfigError("Retention keeps no keys and values; this cache is of another model.")

    update = lazy_initialization  # type: ignore[assignment]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.state.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.state.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        self.state.memory, self.state.length = torch.zeros_like(self.state.memory), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.memory = self.state.memory.index_select(0, beam_idx.to(self.state.memory.device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.memory = self.state.memory.repeat_interleave(repeats, dim=0)

    def crop(self, max_length: int) -> None:
        raise ConfigError("What retention has read cannot be taken back.")


def states_in(
    cache: Cache, count: int, fresh: Callable[[], Sequence[LayerState]]
) -> list[RetentionState]:
    """The first ``count`` states of a cache, or in an empty one all ``fresh`` ones, which it keeps
    from now on.

    It may have more: of steps that the halting head spared every row.
    """
    if not isinstance(cache, DynamicCache):
        raise ConfigError("Retention needs a DynamicCache, which it fills with states of its own.")
    past = cache.get_seq_length()
    if past == 0:
        cache.layers = [RetentionLayer(state) for state in fresh()]
    layers = [layer for layer in cache.layers if isinstance(layer, RetentionLayer)][:count]
    if len(layers) < count or any(layer.state.length != past for layer in layers):
        raise ConfigError("This cache was filled by another model, or with fewer steps.")
    return [layer.state for layer in layers]


def starts_in(attention_mask: Tensor | None, past: int) -> Tensor | None:
    """Where the tokens of a row begin after its padding, which they do not see: bool [B, T].

    Raises ConfigError where padding stands between tokens: a memory cannot leave out what came last
    and keep what came before.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.dim() != 2:
        raise ConfigError("The attention mask must be one number for each token: [B, T].")
    token = attention_mask.bool()
    before = torch.nn.functional.pad(token[:, :-1], (1, 0), value=False)
    starts = token & ~before
    if bool((starts.sum(1) > 1).any()):
        raise ConfigError(
            "Padding stands between the tokens of a row, or between a prompt and what follows it, "
            "and retention would forget what came before. Pad on the left, with a tokenizer of "
            'transformers:\n  tokenizer.padding_side = "left"'
        )
    return starts[:, past:]


class ThimbleRetNetForCausalLM(ThimbleCausalLM):
    """``CausalLM`` over retention as transformers wants a model.

    Its cache is as large after any number of tokens, and its context has no end. Rows may be padded
    on the left (``attention_mask``), and on the right where nothing follows; padding between tokens
    is refused.
    """

    config_class = ThimbleRetNetConfig
    model: CausalLM

    def __init__(self, config: ThimbleRetNetConfig) -> None:
        super().__init__(config)
        where = config.name_or_path or "The configuration"
        ours = interop_recursive.parse(vars(config), where, interop_retention.MODEL_TYPE)
        self.model = CausalLM(ours)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids [B, T] -> float32 logits [B, T, vocabulary], and with ``labels`` [B, T] (-100:
        none) the cross-entropy of each next token.

        ``attention_mask`` [B, past + T] is 0 at padding. Raises ConfigError for a cache or a mask
        of another kind, and for padding between tokens.
        """
        model = self.model
        model.compute_dtype = self.dtype
        cache, past = self._cache_of(past_key_values, use_cache)
        state = None
        if cache is not None:
            count = model.config.num_hidden_layers
            state = states_in(cache, count, lambda: model.new_state(len(input_ids)))
        hidden = model.hidden(input_ids, state, starts_in(attention_mask, past))
        logits, loss = self._logits_and_loss(hidden, logits_to_keep, labels, **more)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
