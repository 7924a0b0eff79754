"""Training: the loop, its guards, checkpoints and plan."""

from __future__ import annotations

from thimble.training.loop import train
from thimble.training.retry import train_with_retries
from thimble.training.run import Run

__all__ = ["Run", "train", "train_with_retries"]
