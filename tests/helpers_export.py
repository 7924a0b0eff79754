"""Checkpoints of small models, with the tokenizer of the tests' tokens."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.helpers_training import token_directory
from tests.models.test_causal_lm import model_of, small
from thimble.config.model import ModelConfig
from thimble.models.causal_lm import CausalLM
from thimble.tokens.shards import TokenSplit
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer
from thimble.training.checkpoint import save_model

NARROW = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPES = {
    "llama": small(**NARROW),
    "tiny": small(  # that of slm_tiny: 6 heads of 64 on a width of 256
        vocab_size=320, hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=1
    ),
    "untied": small(**NARROW, tie_word_embeddings=False, rope_theta=5e5),
}


@functools.cache
def trained(shape: str) -> CausalLM:
    """A model that knows the held-out text by heart, so that no two tokens are about as likely."""
    model = model_of(SHAPES[shape])
    stream = torch.tensor(TokenSplit(token_directory(), "test").tokens.astype("int64"))
    length = model.config.max_position_embeddings + 1
    windows = stream.unfold(0, length, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(120):
        ids = windows[torch.randint(len(windows), (4,), generator=draw)]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def checkpoint_of(
    directory: Path, shape: str | ModelConfig = "llama", tokenizer: Tokenizer | None = None
) -> Path:
    """Write a model: a trained one of ``SHAPES``, or one of random weights of another shape."""
    directory.mkdir(parents=True, exist_ok=True)
    model = trained(shape) if isinstance(shape, str) else model_of(shape)
    save_model(directory, model, tokenizer or load_tokenizer(token_directory()))
    return directory
