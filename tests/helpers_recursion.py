"""Conversations and puzzles so few, and models so small, that a step takes milliseconds."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path

from tests.helpers_training import token_directory
from thimble import api
from thimble.config.load import load
from thimble.config.schema import Config
from thimble.training import devices
from thimble.training.data import open_data, ready
from thimble.training.distributed import Processes
from thimble.training.loop import Trainer

TINY = [
    *("model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1"),
    *("model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16"),
    *("model.H_cycles=2", "model.L_cycles=1", "model.halt_max_steps=3"),
    *("training.log_every=3", "training.eval_every=6", "training.save_every=6"),
    *("optim.warmup_steps=4", "optim.learning_rate=0.01", "precision=float32"),
]
WORDS = (
    *("mount", "disk", "driver", "kernel", "page"),
    *("cache", "signal", "process", "memory", "file"),
)


@functools.cache
def conversations_file() -> Path:
    """120 questions about words, of different lengths, their answers in them."""
    folder = Path(tempfile.mkdtemp(prefix="thimble-test-"))
    lines = []
    for number in range(120):
        words = [WORDS[(number * k) % 10] for k in range(1, 2 + number % 5)]
        turns = [("human", f"Say {' and '.join(words)} {number}"), ("gpt", " ".join(words))]
        record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        lines.append(json.dumps(record))
    (folder / "talk.jsonl").write_text("\n".join(lines))
    return folder / "talk.jsonl"


@functools.cache
def conversation_directory() -> str:
    given = os.environ.get("THIMBLE_TEST_CONVERSATIONS")
    if given:
        return given
    built = api.build_conversations(
        conversations_file(),
        tokenizer=token_directory(),
        output=conversations_file().parent / "built",
        workers=1,
        seq_len=80,
        val_ratio=0.1,
        system_message="",
    )
    os.environ["THIMBLE_TEST_CONVERSATIONS"] = str(built.path)
    return str(built.path)


@functools.cache
def puzzle_directory() -> str:
    given = os.environ.get("THIMBLE_TEST_PUZZLES")
    if given:
        return given
    folder = Path(tempfile.mkdtemp(prefix="thimble-test-"))
    path = str(api.build_sudoku(folder / "sudoku", generate=60, generate_test=8, size=4))
    os.environ["THIMBLE_TEST_PUZZLES"] = path
    return path


def instruct(output_dir: Path, *overrides: str) -> Config:
    """98 conversations for training: an epoch of batches of 8, each with up to 3 steps."""
    return ready(
        load(
            "instruct_os",
            [
                *TINY,
                "dataset.name=null",
                f"data.path={conversation_directory()}",
                f"output_dir={output_dir}",
                "model.vocab_size=300",
                "model.max_position_embeddings=80",
                "training.sequence_length=80",
                "training.micro_batch_size=4",
                "training.gradient_accumulation_steps=2",
                "evaluation.sample_tokens=8",
                *overrides,
            ],
        )
    )


def puzzle(output_dir: Path, *overrides: str) -> Config:
    return ready(
        load(
            "puzzle_sudoku",
            [
                *TINY,
                f"data.path={puzzle_directory()}",
                f"output_dir={output_dir}",
                "model.puzzle_emb_len=2",
                "training.max_steps=12",
                "training.micro_batch_size=4",
                "training.gradient_accumulation_steps=2",
                *overrides,
            ],
        )
    )


def trainer(config: Config) -> Trainer:
    device = devices.resolve_device(config.device)
    return Trainer(config, open_data(config), device, Processes())
