"""A model so small that a step takes milliseconds, and tokens for it."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers_cli import SMALL, make_corpus
from thimble import tokens
from thimble.config.load import load
from thimble.config.schema import Config
from thimble.tokens.shards import TokenSplit
from thimble.training import devices
from thimble.training.checkpoint import unpickle_safely
from thimble.training.distributed import Processes
from thimble.training.loop import Trainer
from thimble.training.run import RunFolder

WINDOW = 16


@functools.cache
def token_directory() -> str:
    """Tokens of random sentences, built once for a test session (and its child processes)."""
    given = os.environ.get("THIMBLE_TEST_TOKENS")
    if given:
        return given
    folder = Path(tempfile.mkdtemp(prefix="thimble-test-"))
    corpus = make_corpus(folder / "corpus", documents=60)
    path = str(tokens.build(corpus, output=folder / "tokens", vocab_size=300, workers=1))
    os.environ["THIMBLE_TEST_TOKENS"] = path
    return path


def config(output_dir: Path, *overrides: str) -> Config:
    """24 windows of 16 tokens an epoch would be too few to matter; here it is about 190 of them,
    and a step takes 4: an epoch has about 47 steps unless ``training.*`` says otherwise."""
    return load(
        "slm_nano",
        [
            *SMALL,
            f"data.path={token_directory()}",
            f"output_dir={output_dir}",
            f"training.sequence_length={WINDOW}",
            "training.gradient_accumulation_steps=2",
            "training.max_steps=12",
            "training.log_every=3",
            "training.eval_every=4",
            "training.save_every=4",
            "optim.warmup_steps=4",
            "optim.learning_rate=0.01",
            "optim.min_lr_ratio=0.1",
            "evaluation.prompts=[the kernel]",
            "evaluation.max_tokens=300",
            "precision=float32",
            *overrides,
        ],
    )


def trainer(configuration: Config) -> Trainer:
    device = devices.resolve_device(configuration.device)
    data = TokenSplit(configuration.data.path, "train")
    return Trainer(configuration, data, device, Processes())


def state_of(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint holds, each part as a hash that differs in the last bit of any number."""

    def digest(value: Any) -> str:
        if hasattr(value, "numpy"):
            return hashlib.sha256(value.numpy().tobytes()).hexdigest()
        if isinstance(value, dict):
            return digest(sorted((str(key), digest(item)) for key, item in value.items()))
        if isinstance(value, list | tuple):
            return digest(repr([digest(item) for item in value]))
        return hashlib.sha256(repr(value).encode()).hexdigest()

    return {
        "weights": digest(load_file(checkpoint / "model.safetensors")),
        "optimizer": digest(unpickle_safely(checkpoint / "optimizer.pt")),
        "rng": digest(unpickle_safely(checkpoint / "rng.pt")),
        "cursor": (checkpoint / "data_cursor.json").read_text(),
    }


def timeless(folder: Path) -> list[dict[str, Any]]:
    """A run's records without what the clock and the machine put there."""
    varying = {"tokens_per_second", "memory_bytes", "seconds"}
    return [
        {key: value for key, value in record.items() if key not in varying}
        for record in RunFolder(folder).records()
        if "event" not in record
    ]


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made
