"""What the old playbook begins with: SlimOrca's JSONL, OpenOrca's parquet, a tokenizer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece

VOCABULARY = 360
# The published model, so small that a step takes milliseconds.
SMALL = [
    *(f"model.vocab_size={VOCABULARY}", "arch.hidden_size=32", "model.intermediate_size=48"),
    *("arch.num_heads=2", "model.num_key_value_heads=1", "model.head_dim=16"),
    *("arch.H_cycles=1", "arch.L_cycles=1", "arch.halt_max_steps=2", "dataset.seq_len=64"),
    *("device=cpu", "dataloader_workers=0", "lr_warmup_steps=2", "logging.tensorboard=false"),
    *("logging.wandb=false", "evaluation.sample_tokens=4"),
]
WORDS = ["mount", "disk", "driver", "kernel", "page", "cache", "signal", "memory", "file", "log"]


def turns(number: int) -> tuple[str, str]:
    words = [WORDS[(number * k) % 10] for k in range(1, 2 + number % 5)]
    return f"Say {' and '.join(words)} {number}", " ".join(words)


def slimorca_records(count: int) -> list[dict[str, Any]]:
    """In the form of SlimOrca: turns with weights."""
    made = []
    for number in range(count):
        question, answer = turns(number)
        made.append(
            {
                "conversations": [
                    {"from": "system", "value": "You are brief.", "weight": None},
                    {"from": "human", "value": question, "weight": 0.0},
                    {"from": "gpt", "value": answer, "weight": 1.0},
                ]
            }
        )
    return made


def write_lines(path: Path, records: list[Any]) -> Path:
    """A JSONL; a record that is a text stands there as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (each if isinstance(each, str) else json.dumps(each) for each in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_slimorca(folder: Path, count: int = 64) -> Path:
    return write_lines(folder / "SlimOrca.jsonl", slimorca_records(count))


def write_openorca(folder: Path, count: int = 64) -> Path:
    """In the form of OpenOrca: a table of columns, in its two files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("1M-GPT4-Augmented.parquet", "3_5M-GPT3_5-Augmented.parquet")
    for part, name in enumerate(names):
        numbers = range(1000 + part, 1000 + count, 2)
        columns = {
            "id": [f"flan.{number}" for number in numbers],
            "system_prompt": [["", "You are brief."][number % 3 > 0] for number in numbers],
            "question": [turns(number)[0] for number in numbers],
            "response": [turns(number)[1] for number in numbers],
        }
        pq.write_table(pa.table(columns), folder / name)
    return folder


def write_tokenizer(path: Path, *, reverse: bool = False) -> Path:
    """A SentencePiece model with byte fallback, as Llama's is; ``reverse``: of other words."""
    texts = [text for number in range(200) for text in turns(number)]
    if reverse:
        texts = [text[::-1] for text in texts]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, "You are brief.", "[SYSTEM] [USER] [ASSISTANT]"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path
