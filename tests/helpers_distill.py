"""Students so small that a step takes milliseconds, and a teacher of the same vocabulary."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests import helpers_training
from tests.teachers.helpers import make_teacher
from thimble.config.schema import Config
from thimble.tokens.packing import pack

RETENTION = [
    "model.mixer=retention",
    "model.num_key_value_heads=2",
    "model.retention_horizons=[4,64]",
    "model.retention_chunk=8",
]
RECURSIVE = ["model.schedule=recursive", "model.halt_max_steps=1", "model.H_cycles=2"]
RECURSIVE += ["model.L_cycles=1", "model.bp_cycles=2"]


def config(output_dir: Path, teacher: Path | None, *overrides: str) -> Config:
    """A run of retention; with a ``teacher`` it learns from that."""
    told = [] if teacher is None else ["objective.name=distill", f"teacher.path={teacher}"]
    return helpers_training.config(output_dir, *RETENTION, *told, "teacher.topk=20", *overrides)


def teacher_in(folder: Path, **settings: Any) -> Path:
    return make_teacher(folder / "teacher", **settings)


def packed_in(folder: Path) -> Path:
    """Chunks of ``WINDOW`` tokens of documents of very different lengths."""
    draw = random.Random(1)
    counts = (2, 9, 1, 40, 3, 30) * 12
    texts = [" ".join(draw.choices(["kernel", "disk", "a"], k=n)) for n in counts]
    lines = [json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(texts)]
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl").write_text("".join(lines))
    options: dict[str, Any] = {"tokenizer": helpers_training.token_directory(), "val_ratio": 0.2}
    length = helpers_training.WINDOW
    pack(folder / "in", folder / "out", workers=1, max_seq_length=length, **options)
    return folder / "out"
