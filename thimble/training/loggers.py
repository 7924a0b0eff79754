"""Where records go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from thimble.config.schema import Config
from thimble.errors import EnvironmentProblem


class Loggers:
    """Sends every number of a record to the loggers the configuration asks for."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.tensorboard: Any = None
        self.services: list[Any] = []
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder))
        options = config.logging
        wandb = options.wandb
        if wandb is None and importlib.util.find_spec("wandb"):
            os.environ.setdefault("WANDB_MODE", "offline")
            wandb = True
        for name, wanted in (("wandb", wandb), ("trackio", options.trackio)):
            if wanted:
                self.services.append(_start(name, config, folder))

    def write(self, record: dict[str, Any]) -> None:
        values = {key: value for key, value in record.items() if key != "step"}
        for key, value in values.items():
            if self.tensorboard and isinstance(value, int | float):
                group = "validation" if key.startswith("val_") else "training"
                self.tensorboard.add_scalar(f"{group}/{key}", value, record["step"])
        for service in self.services:
            service.log(values, step=record["step"])

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        for service in self.services:
            service.finish()


def _start(name: str, config: Config, folder: Path) -> Any:
    import importlib

    try:
        service = importlib.import_module(name)
    except ImportError:
        raise EnvironmentProblem(
            f"logging.{name}=true needs the extra: pip install 'thimble-lm[{name}]'."
        ) from None
    service.init(project="thimble", name=folder.name, config=config.model_dump(mode="json"))
    return service
