"""One process or several (torchrun): the few things a training loop must know about it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from thimble.errors import ConfigError


class Processes:
    """This process's rank among ``count``; all methods are no-ops when it is alone."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.main = self.rank == 0

    @contextlib.contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        if self.count == 1:
            yield
            return
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
        try:
            yield
        finally:
            dist.destroy_process_group()

    def rows(self, batch: int) -> slice:
        """The rows of a global batch that belong to this process."""
        if batch % self.count:
            raise ConfigError(
                f"A step of {batch} sequences cannot be split over {self.count} processes. Choose "
                "training.micro_batch_size x training.gradient_accumulation_steps as a multiple."
            )
        share = batch // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def add(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def agree(self, flag: bool, device: torch.device) -> bool:
        """True when any process says so."""
        if self.count == 1:
            return flag
        return bool(self.add(torch.tensor([float(flag)], device=device)).item())

    def share(self, text: str) -> str:
        """The main process's text, on every process."""
        if self.count == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0)
        return box[0]
