"""The command in this process, and a small corpus and model it can work on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thimble import cli
from thimble.artifacts import atomic_directory, write_manifest

# slm_nano made so small that a step takes milliseconds.
SMALL = [
    "model.vocab_size=300",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.head_dim=8",
    "model.max_position_embeddings=32",
    "training.micro_batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.eval_every=2",
    "training.save_every=2",
    "evaluation.sample_tokens=4",
    "logging.tensorboard=false",
    "device=cpu",
]


@dataclass
class Answer:
    """What a call of the command left: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


class Command:
    """Calls ``thimble`` with words, in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *words: str) -> Answer:
        self.capfd.readouterr()
        try:
            status = cli.main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = self.capfd.readouterr()
        return Answer(status, out, err)


def make_corpus(directory: Path, documents: int = 120, texts: list[str] | None = None) -> Path:
    """A corpus folder of random sentences, or of ``texts``, each document its own group."""
    draw = random.Random(0)
    words = ["kernel", "driver", "module", "device", "disk", "loads", "mounts", "the", "a"]
    texts = texts or [" ".join(draw.choices(words, k=40)) + f" {i}." for i in range(documents)]
    documents = len(texts)
    table = pa.table(
        {
            "id": [f"d{i}" for i in range(documents)],
            "text": texts,
            "source": ["made"] * documents,
            "category": ["text"] * documents,
            "licence": ["CC0-1.0"] * documents,
            "group": [f"g{i}" for i in range(documents)],
        }
    )
    with atomic_directory(directory) as folder:
        pq.write_table(table, folder / "documents-00000.parquet", compression="zstd")
        counts = {"documents": documents, "bytes": sum(len(text) for text in texts)}
        write_manifest(folder, "corpus", inputs=["made"], options={}, counts=counts)
    return directory
