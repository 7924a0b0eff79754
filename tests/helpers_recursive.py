"""Conversations, puzzles and recursive models so small that a step takes milliseconds."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from thimble.artifacts import atomic_directory, read_json, write_json, write_manifest
from thimble.config.load import CONFIG_FILE, check, load, save
from thimble.config.schema import Config, DatasetConfig, ModelConfig
from thimble.conversations.build import build
from thimble.conversations.dataset import Conversations
from thimble.models import interop
from thimble.models.recursive import RecursiveLM
from thimble.puzzles.dataset import Group, SplitWriter, write_identifiers
from thimble.puzzles.loader import Split
from thimble.tokens.tokenizer import load_tokenizer, train

WORDS = [
    *("the", "kernel", "loads", "a", "module", "mounts", "disk", "device", "driver", "which"),
    *("what", "how", "why", "is", "7", "42", "größe"),
]


def records(count: int, seed: int = 2) -> list[dict[str, Any]]:
    """Conversations of one or two turns of random words."""
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))

    return [
        {
            "conversations": [
                {"from": ("human", "gpt")[i % 2], "value": f"{text(12)} {number}"}
                for i in range(2 * draw.randint(1, 2))
            ]
        }
        for number in range(count)
    ]


@functools.cache
def tokenizer_folder() -> str:
    folder = tempfile.mkdtemp(prefix="thimble-test-")
    draw = random.Random(1)
    train([" ".join(draw.choices(WORDS, k=12)) for _ in range(200)], 330).save(folder)
    return folder


def build_conversations(folder: Path, count: int = 80, **options: Any) -> Conversations:
    source = folder / "records.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(record) + "\n" for record in records(count)))
    given = {"seq_len": 64, "test_ratio": 0.3, "system_message": "", **options}
    config = DatasetConfig(name=str(source), tokenizer_path=tokenizer_folder(), **given)
    return Conversations(build(config, output=folder / "conversations", workers=1).path)


@functools.cache
def conversations() -> Conversations:
    return build_conversations(Path(tempfile.mkdtemp(prefix="thimble-test-")))


def build_puzzles(folder: Path, test: int = 13, seq_len: int = 9, seed: int = 0) -> Path:
    """Puzzles of random digits; the answer is the input with its digits in another order."""
    draw = np.random.default_rng(seed)
    with atomic_directory(folder) as new:
        for name, count in (("train", 20), ("test", test)):
            writer = SplitWriter(new / name, seq_len, 6)
            for number in range(count):
                size = 1 + number % 2
                inputs = draw.integers(1, 6, (size, seq_len))
                writer.add(Group(inputs, inputs[:, ::-1] % 5 + 1, [size], [0]))
            writer.close(1)
        write_identifiers(new, [])
        write_manifest(new, "puzzles", inputs=[], options={"seed": 0}, counts={})
    return folder


@functools.cache
def puzzles() -> Path:
    return build_puzzles(Path(tempfile.mkdtemp(prefix="thimble-test-")) / "puzzles")


def model_config(**changes: Any) -> ModelConfig:
    shape = {
        "schedule": "recursive",
        "vocab_size": 330,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "H_cycles": 2,
        "L_cycles": 1,
        "halt_max_steps": 3,
    }
    return ModelConfig.model_validate({**shape, **changes})


def puzzle_config(split: Split, **changes: Any) -> ModelConfig:
    metadata = split.metadata
    shape = {
        "causal": False,
        "vocab_size": metadata.vocab_size,
        "max_position_embeddings": metadata.seq_len,
    }
    return model_config(**{**shape, **changes})


def network_of(config: ModelConfig, seed: int = 0, halting: bool = True) -> RecursiveLM:
    """A model with random weights; with ``halting`` its halting head stops some rows early."""
    network = RecursiveLM(config).initialize(torch.Generator().manual_seed(seed))
    if halting:
        with torch.no_grad():
            network.q_head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
            network.q_head.bias.fill_(-1.5)
    return network


def run_config(model: ModelConfig, data: Path, form: str, **dataset: Any) -> Config:
    tree = load("slm_nano").model_dump(mode="python")
    tree["recipe"] = "small"
    tree["model"] = model.model_dump()
    tree["data"]["path"] = str(data)
    tree["dataset"] |= dataset
    tree["objective"] |= {"name": "act", "form": form}
    tree["training"]["sequence_length"] = model.max_position_embeddings
    return check(tree)


def save_checkpoint(
    directory: Path, network: RecursiveLM, config: Config, tokenizer: str | None = None
) -> Path:
    """A checkpoint's files without those that only training reads."""
    data = read_json(Path(config.data.folder) / "manifest.json")
    with atomic_directory(directory) as new:
        write_json(new / "config.json", interop.to_native_config(network.config, {}))
        tensors = interop.to_native_tensors(network)
        save_file(
            {name: tensor.detach().clone() for name, tensor in tensors.items()},
            new / interop.WEIGHTS,
        )
        if tokenizer:
            load_tokenizer(tokenizer).save(new)
        save(config, new / CONFIG_FILE)
        inputs = {"tokens": data["fingerprint"], "path": config.data.path}
        options = {"recipe": config.recipe, "step": 7}
        write_manifest(new, "checkpoint", inputs=inputs, options=options, counts={})
    return directory


def conversation_checkpoint(folder: Path, count: int = 60, **changes: Any) -> Path:
    """A checkpoint of an untrained model, and its conversations beside it."""
    data = build_conversations(folder, count)
    model = model_config(vocab_size=data.vocab_size, **changes)
    dataset = {"name": str(folder / "records.jsonl"), "seq_len": 64, "system_message": ""}
    dataset |= {"test_ratio": 0.3, "tokenizer_path": tokenizer_folder()}
    config = run_config(model, data.directory, "softmax", **dataset)
    return save_checkpoint(folder / "checkpoint", network_of(model), config, tokenizer_folder())


def puzzle_checkpoint(folder: Path, data: Path, **changes: Any) -> Path:
    model = puzzle_config(Split(data, "test"), **changes)
    config = run_config(model, data, "stablemax")
    return save_checkpoint(folder / "checkpoint", network_of(model), config)
