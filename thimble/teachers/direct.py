"""A teacher that is loaded here and asked while the student learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thimble.errors import DataError
from thimble.objectives.sparse_targets import SampledTargets, drawn, likeliest
from thimble.teachers import models
from thimble.teachers.asked import Asked, Targets
from thimble.teachers.examples import Examples
from thimble.teachers.models import LoadedModel
from thimble.training.devices import resolve_precision


class DirectTeacher:
    """A causal language model of transformers. Its logits are there a chunk of positions at a time.

    ``vocab_size``: the ids of the data; the distribution is over these alone.
    """

    def __init__(
        self, loaded: LoadedModel, asked: Asked, vocab_size: int, identity: dict[str, Any]
    ):
        asked.check(vocab_size)
        self.loaded, self.asked, self.identity = loaded.limited(vocab_size), asked, identity
        self.precision = str(loaded.head.dtype).removeprefix("torch.")

    @torch.no_grad()
    def targets(
        self, numbers: Sequence[int], inputs: Tensor, starts: Tensor | None = None
    ) -> Targets:
        loaded, asked = self.loaded, self.asked
        device = loaded.head.device
        begin = None if starts is None else starts.to(device)
        hidden = loaded.hidden(inputs.to(device), begin)
        found: Targets
        if asked.sampled:
            rows = [self.draw(int(n), row) for n, row in zip(numbers, hidden, strict=True)]
            index, weights, logs = (torch.stack(part) for part in zip(*rows, strict=True))
            found = SampledTargets(index, weights, logs, asked.temperatures[0])
        else:
            found = likeliest(hidden, loaded.head, asked.k, asked.temperatures, loaded.finish)
        return to(found, inputs.device)

    def draw(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A row's draws depend on seed and number alone, not on what stands beside it."""
        generator = torch.Generator(hidden.device)
        generator.manual_seed((self.asked.seed * 1_000_003 + number) % 2**63)
        asked, loaded = self.asked, self.loaded
        found = drawn(hidden, loaded.head, asked.k, asked.temperatures[0], generator, loaded.finish)
        return found.indices, found.weights, found.log_probs


def to(targets: Targets, device: torch.device) -> Targets:
    """The same on another device."""
    moved = {n: x.to(device) for n, x in vars(targets).items() if isinstance(x, Tensor)}
    return type(targets)(**{**vars(targets), **moved})


def open_direct(
    name: str | Path,
    examples: Examples,
    asked: Asked,
    *,
    adapter: str | Path | None = None,
    device: torch.device,
    precision: str = "auto",
    ram_disk: bool = False,
) -> DirectTeacher:
    """Load a teacher for a data set; bfloat16 where the device has it.

    ``name``: a folder, a run or checkpoint of ours, or a model on the hub. Raises DataError when
    it is an adapter alone, its vocabulary is not the data's, or the rows are longer than it reads.
    """
    folder = models.find(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} is an adapter, not a model. Name the whole one, which `thimble teacher "
            "finetune` writes beside it as `merged`."
        )
    models.check_vocabulary(folder, examples)
    loaded = models.load(
        folder,
        adapter=adapter,
        device=device,
        dtype=resolve_precision(precision, device),
        ram_disk=ram_disk,
    )
    models.check_fits(loaded, examples)
    who = models.identity(folder, None if adapter is None else Path(adapter))
    return DirectTeacher(loaded, asked, examples.vocab_size, who)
