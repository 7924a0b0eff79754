"""What our models have in common as models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel

from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM


class ThimbleConfig(PreTrainedConfig):
    """``ModelConfig``'s keys by their own names, and the ids of special tokens."""

    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' attribute)


class ThimbleCausalLM(PreTrainedModel, GenerationMixin):
    """A network of ours, in ``model``: how it is filled, and how a call begins and ends."""

    base_model_prefix = "model"
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    model: CausalLM | RecursiveLM

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Set what no file gave: tables always, and in a new model the weights."""
        if not isinstance(module, CausalLM | RecursiveLM):
            return
        given = module.state_dict(keep_vars=True)
        fresh = type(module)(module.config).initialize()
        for name, buffer in fresh.named_buffers():
            if name not in given:
                module.get_buffer(name).copy_(buffer)
        for name, tensor in fresh.state_dict().items():
            if not getattr(given[name], "_is_hf_initialized", False):
                given[name].copy_(tensor)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def _cache_of(self, given: Cache | None, use_cache: bool | None) -> tuple[Cache | None, int]:
        """The cache of a call, a new one where it is wanted, and how many positions it has seen."""
        cache = DynamicCache() if given is None and use_cache else given
        return cache, 0 if cache is None else int(cache.get_seq_length())

    def _logits_and_loss(
        self, hidden: Tensor, logits_to_keep: int | Tensor, labels: Tensor | None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Float32 logits of the last or of the named positions, and with labels the loss."""
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.model.head(hidden).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **more)
        return logits, loss
