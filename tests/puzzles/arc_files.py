"""Small ARC files in the form of the competition."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

Grid = list[list[int]]


def grid(draw: random.Random, colours: int = 10) -> Grid:
    rows, columns = draw.randint(1, 6), draw.randint(1, 6)
    return [[draw.randrange(colours) for _ in range(columns)] for _ in range(rows)]


def task(draw: random.Random, tests: int = 1) -> tuple[dict[str, Any], list[Grid]]:
    """A task of three demonstrations, and the outputs of its tests."""
    return {
        "train": [{"input": grid(draw), "output": grid(draw)} for _ in range(3)],
        "test": [{"input": grid(draw)} for _ in range(tests)],
    }, [grid(draw) for _ in range(tests)]


def write(folder: Path, subsets: dict[str, dict[str, tuple[dict[str, Any], list[Grid]]]]) -> str:
    """The files of each subset; returns their prefix."""
    folder.mkdir(exist_ok=True)
    for subset, tasks in subsets.items():
        for number, kind in enumerate(("challenges", "solutions")):
            content = {name: parts[number] for name, parts in tasks.items()}
            (folder / f"arc_{subset}_{kind}.json").write_text(json.dumps(content))
    return str(folder / "arc")


def make(folder: Path, training: int = 3, evaluation: int = 2) -> str:
    """Random tasks; those of ``evaluation`` have one, two, ... test inputs."""
    draw = random.Random(0)
    return write(
        folder,
        {
            "training": {f"train{n}": task(draw) for n in range(training)},
            "evaluation": {f"eval{n}": task(draw, tests=1 + n) for n in range(evaluation)},
        },
    )
