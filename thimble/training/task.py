"""What differs between runs: data, loss and evaluation. The loop does the rest.

micro_batches() -> loss(objective, each) -> settle()      one step
record(), evaluate(), samples()                           what is told of it
cursor(), tensors()                                       what a checkpoint keeps of it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from thimble.config.schema import Config
    from thimble.tokens.tokenizer import Tokenizer
    from thimble.training.checkpoint import TrainerState
    from thimble.training.distributed import Processes


class Task(Protocol):
    """The data and the loss of a run.

    ``model`` is what is trained, ``objective`` what is called for it and what DDP and FSDP wrap;
    ``per_epoch`` counts the examples (windows, conversations, puzzles) of an epoch, ``batch_size``
    those of a step over all processes. ``compiled``: the model is to be compiled; where it is
    sharded the loop does so.
    """

    model: Any
    objective: nn.Module
    tokenizer: Tokenizer | None
    batch_size: int
    per_epoch: int
    max_steps: int
    compiled: bool
    selects: bool  # whether ``evaluate`` says which checkpoint is the best

    def micro_batches(self, state: TrainerState) -> list[Any]:
        """What each pass of the next step gets, of this process; moves the place in the data."""

    def loss(self, objective: nn.Module, piece: Any) -> Tensor:
        """A pass. Over the passes and processes of a step the values add up to its loss."""

    def settle(self) -> None:
        """The passes of a step are done."""

    def share(self, state: TrainerState) -> float:
        """How much of the run's data has been given out, 0 where its steps are what ends it."""

    def finished(self, state: TrainerState) -> bool: ...

    def expected_steps(self, state: TrainerState) -> int:
        """Steps of the whole run, as far as is known by now."""

    def record(self, learning_rate: float) -> dict[str, float]:
        """Figures of the steps since the last call, beside their loss. Waits for the device."""

    def evaluate(self) -> dict[str, Any]:
        """Figures of held-out data, with ``val_loss``; none when nothing is held out."""

    def samples(self) -> list[str]:
        """What the model says, for a person to look at."""

    def baselines(self) -> dict[str, float]:
        """Bits per byte of simpler models on the held-out text, by name."""

    def cursor(self, state: TrainerState) -> dict[str, Any]:
        """The place in the data, and what it is a place in. Resuming with another is refused."""

    def tensors(self) -> dict[str, Tensor]:
        """What is between two steps of all processes; all of them must call."""

    def resume(self, cursor: dict[str, Any], tensors: dict[str, Tensor]) -> None: ...

    def documents(self) -> dict[str, Any]:
        """JSON files that belong into a checkpoint, by name."""


def make_task(
    config: Config,
    data: Any,
    model: Any,
    device: torch.device,
    processes: Processes,
    *,
    sharded: bool,
) -> Task:
    """The task of a configuration, on data that ``data.open_data`` opened."""
    kind: Any
    if config.objective.name == "act":
        from thimble.training.recursion import RecursionTask as kind
    elif config.objective.name == "distill":
        from thimble.training.distillation import DistillTask as kind
    else:
        from thimble.training.language import NextTokenTask as kind
    return kind(config, data, model, device, processes, sharded=sharded)
