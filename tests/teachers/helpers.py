"""Tiny teachers of transformers over the vocabulary of the tests' tokens, and rows to ask about."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.helpers_training import token_directory
from thimble.teachers import WindowExamples
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer

LENGTH = 12


def examples(split: str = "train", length: int = LENGTH) -> WindowExamples:
    return WindowExamples(token_directory(), split, length)


def make_teacher(
    folder: Path,
    *,
    seed: int = 0,
    extra: int = 0,
    tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> Path:
    """A llama of width 32 with the tokenizer of the tests' tokens, or with ``tokenizer``; ``extra``
    rows pad its head."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or load_tokenizer(token_directory())
    config = LlamaConfig(
        **{
            "vocab_size": tokenizer.vocab_size + extra,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            # Large, so that its distributions are far from even.
            "initializer_range": 0.3,
            "bos_token_id": tokenizer.eot_id,
            "eos_token_id": tokenizer.eot_id,
            "pad_token_id": None,
        }
        | settings
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@functools.cache
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def logits_of(folder: Path, inputs: Any) -> Tensor:
    """What transformers says, in float64: [B, L, V]."""
    return reference(folder)(torch.as_tensor(np.asarray(inputs))).logits
