"""Small splits in memory, as `TokenSplit` presents them, and changes to a finished run."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from thimble.artifacts import MANIFEST, read_json, sha256_file, write_json
from thimble.config.load import CONFIG_FILE, load, save
from thimble.training.run import RunFolder

EOT = 0


def memory_split(
    documents: list[list[int]],
    *,
    categories: list[str] | None = None,
    sizes: list[int] | None = None,
    vocab_size: int = 16,
) -> SimpleNamespace:
    """Documents of ids (without end-of-text) as a split; a token counts as three bytes."""
    lengths = [len(document) + 1 for document in documents]
    table = pa.table(
        {
            "id": [f"d{i}" for i in range(len(documents))],
            "source": ["test"] * len(documents),
            "category": categories or ["text"] * len(documents),
            "start": np.cumsum([0, *lengths])[:-1].astype(np.int64),
            "tokens": np.asarray(lengths, dtype=np.int64),
            "bytes": np.asarray(sizes or [3 * n for n in lengths], dtype=np.int64),
        }
    )
    tokens = np.asarray([i for d in documents for i in [*d, EOT]], dtype=np.uint16)
    return SimpleNamespace(tokens=tokens, documents=table, vocab_size=vocab_size, eot_id=EOT)


@functools.cache
def finished_run() -> Path:
    """A run of a very small model, trained once for a test session."""
    from tests import helpers_training
    from thimble.training import train

    config = helpers_training.config(
        Path(tempfile.mkdtemp(prefix="thimble-test-")),
        "training.max_steps=60",
        "training.eval_every=30",
        "training.save_every=30",
    )
    return train(config).path


def best(run: Path) -> Path:
    checkpoint = RunFolder(run).pointed("best")
    assert checkpoint is not None
    return checkpoint


def change_config(run: Path, **nested: Any) -> None:
    """Change keys of a run's configuration and of its best checkpoint's, as if trained so."""
    for folder in (run, best(run)):
        config = load(folder / CONFIG_FILE, nested=nested)
        save(config, folder / CONFIG_FILE)
    reseal(best(run))


def reseal(directory: Path) -> None:
    """Give an artefact's manifest the sizes and sha256s its files have now."""
    manifest = read_json(directory / MANIFEST)
    for name, facts in manifest["files"].items():
        file = directory / name
        facts.update(bytes=file.stat().st_size, sha256=sha256_file(file))
    write_json(directory / MANIFEST, manifest)
