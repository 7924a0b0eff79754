"""A run's folder: configuration, records, checkpoints and the two pointers to them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thimble.artifacts import fingerprint, write_text
from thimble.config import load as configuration
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import DataError

METRICS = "metrics.jsonl"


@dataclass
class Run:
    """What a training run left behind."""

    path: Path
    status: str  # "finished", or what ended it
    step: int
    checkpoint: Path | None  # the best by validation perplexity
    latest: Path | None
    metrics: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        evaluations = [record for record in self.metrics if "val_loss" in record]
        return {
            "run": str(self.path),
            "status": self.status,
            "step": self.step,
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "latest": str(self.latest) if self.latest else None,
            "evaluation": evaluations[-1] if evaluations else None,
        }


class RunFolder:
    """``runs/<recipe>/<time>-<slug>``; only the process that trains writes to it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.metrics_path = self.path / METRICS

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """A new folder named by the time and a fingerprint of the configuration."""
        slug = fingerprint(config.model_dump(mode="json"))[:6]
        stamp = time.strftime("%Y%m%d-%H%M%S")
        base = Path(config.output_dir) / config.recipe / f"{stamp}-{slug}"
        path, number = base, 1
        while True:
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:  # started in the same second
                number += 1
                path = base.with_name(f"{base.name}-{number}")
        folder = cls(path)
        configuration.save(config, path / configuration.CONFIG_FILE)
        return folder

    @classmethod
    def containing(cls, path: str | Path) -> RunFolder:
        """The run folder that ``path`` is, or that a checkpoint at ``path`` belongs to."""
        path = Path(path)
        # A checkpoint holds a copy of the configuration, so its run is looked for first.
        for candidate in (path.parent.parent, path):
            if (candidate / configuration.CONFIG_FILE).is_file():
                return cls(candidate)
        raise DataError(
            f"{path} is not a run (it has no {configuration.CONFIG_FILE}). "
            "Give a folder like runs/<recipe>/<time>-<slug>, or --resume alone for the newest."
        )

    @classmethod
    def newest(cls, output_dir: str, recipe: str) -> RunFolder:
        """The run of ``recipe`` that was started last; DataError when there is none."""
        parent = Path(output_dir) / recipe
        folders = [cls(path) for path in sorted(parent.glob("*")) if path.is_dir()]
        if not folders:
            raise DataError(f"There is no run of {recipe} in {parent} to resume.")
        return folders[-1]

    @classmethod
    def to_resume(cls, config: Config, resume: str | Path) -> RunFolder:
        """The run meant by ``--resume``: ``auto`` is the newest of the recipe."""
        if str(resume) == "auto":
            return cls.newest(config.output_dir, config.recipe)
        return cls.containing(resume)

    def point(self, name: str, checkpoint: Path) -> None:
        write_text(self.checkpoints / name, checkpoint.name + "\n")

    def pointed(self, name: str) -> Path | None:
        """The checkpoint that ``latest`` or ``best`` names, when it is there."""
        try:
            target = self.checkpoints / (self.checkpoints / name).read_text().strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return target if target.is_dir() and target.parent == self.checkpoints else None

    def records(self) -> list[dict[str, Any]]:
        return list(read_records(self.metrics_path)) if self.metrics_path.exists() else []

    def append(self, record: dict[str, Any]) -> None:
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the records after ``step``, which are about to be made again; events that only
        happened once stay."""
        if not self.metrics_path.exists():
            return
        records = self.records()
        kept = [
            record
            for record in records
            if ("event" in record and not record["event"].startswith("saddle"))
            or record["step"] <= step
        ]
        if len(kept) < len(records):
            log.info("%d records after step %d will be made again.", len(records) - len(kept), step)
        write_text(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))

    def to_run(self, status: str, step: int) -> Run:
        return Run(
            path=self.path,
            status=status,
            step=step,
            checkpoint=self.pointed("best"),
            latest=self.pointed("latest"),
            metrics=self.records(),
        )


def told_underway(event: dict[str, Any]) -> bool:
    """Whether an event is one of a run that goes on: neither its begin nor its end."""
    return event["event"] == "objective" or event["event"].startswith("saddle")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl. A cut-off last line (a crash while writing) is passed over;
    a broken line before it is a DataError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if not line.endswith("\n"):
                    log.warning("%s: its last line was cut off and is passed over.", path)
                    return
                raise DataError(f"{path}, line {number} is damaged: {error}.") from error
            yield record
