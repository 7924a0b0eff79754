"""What test_distributed.py runs under torchrun: several trainings, one after the other.

    torchrun --nproc-per-node 2 -m tests.training.several_processes OUTPUT LEG

Each process writes what ended its runs to OUTPUT/<rank>.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import helpers_distill, helpers_recursion
from tests import helpers_training as helpers
from thimble import cli
from thimble.config.schema import Config
from thimble.errors import DataError, ThimbleError
from thimble.training import train, train_with_retries
from thimble.training.feeds import ConversationFeed
from thimble.training.loop import Trainer

RANK = int(os.environ.get("RANK", "0"))
FSDP = "training.data_parallel=fsdp"
# Two blocks, and a vocabulary that two processes cannot share evenly.
SHAPE = ["model.num_hidden_layers=2", "model.vocab_size=301"]
CASES = {
    "muon": [],
    "adamw": ["optim.name=adamw"],
    "adam_atan2": ["optim.name=adam_atan2"],
    "recompute, untied": [
        "training.checkpoint_activations=true",
        "model.tie_word_embeddings=false",
    ],
}
STEP = Trainer.step


def recursive_config(kind: str, output: Path) -> Config:
    """``frozen``: new embeddings for the weights of the run that one process made of puzzles."""
    if kind == "conversations":
        return helpers_recursion.instruct(output, "ema=true", "model.q_continue=true")
    more = ["ema=true", "optim.puzzle_emb_lr=0.01", "training.max_steps=8"]
    if kind == "frozen":
        (first,) = (output.parents[1] / "puzzles" / "one").glob("*/*")
        more += ["freeze_weights=true", f"load_checkpoint={first}"]
    return helpers_recursion.puzzle(output, *more)


def at(step: int, action: Callable[[Trainer], None]) -> None:
    """Do something in the process, once, just before it takes this step; -1: nothing any more."""
    done = []

    def patched(self: Trainer) -> None:
        if self.state.step == step and not done:
            done.append(step)
            action(self)
        STEP(self)

    Trainer.step = patched  # type: ignore[method-assign]


def ended(function: Callable[[], Any]) -> dict[str, Any]:
    try:
        function()
    except ThimbleError as error:
        return {"error": type(error).__name__, "message": str(error), "status": error.status}
    finally:
        at(-1, lambda trainer: None)
    return {"error": None}


def sigterm(trainer: Trainer) -> None:
    if RANK == 1:  # one of them is enough
        os.kill(os.getpid(), signal.SIGTERM)


def nan(trainer: Trainer) -> None:
    """A loss of NaN from the rows of one process alone."""
    objective = trainer.objective

    def bad(*rows: torch.Tensor) -> torch.Tensor:
        return objective(*rows) * (float("nan") if RANK == 1 else 1.0)

    bad.no_sync = objective.no_sync  # type: ignore[attr-defined]
    trainer.objective = bad  # type: ignore[assignment]


def out_of_memory(trainer: Trainer) -> None:
    def allocate(*call: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)  # the allocator itself refuses

    if RANK == 1:
        trainer.model.norm.register_forward_pre_hook(allocate)


def bad_data(trainer: Trainer) -> None:
    if RANK == 1:
        raise DataError("Shard 7 is damaged.")


def same_as_one(output: Path) -> dict[str, Any]:
    """The cases of the comparison, with DDP and with FSDP."""
    for name, overrides in CASES.items():
        for kind in ("ddp", "fsdp"):
            folder = output / name / kind
            train(helpers.config(folder, *SHAPE, *overrides, f"training.data_parallel={kind}"))
    return {}


def legs(output: Path) -> dict[str, Any]:
    """The middle of a run that one process began and another ends: DDP, then FSDP."""
    (run,) = (output / "legs" / "slm_nano").iterdir()
    results = {}
    for kind, step in (("ddp", 6), ("fsdp", 8)):
        at(step, sigterm)
        config = helpers.config(output / "legs", *SHAPE, f"training.data_parallel={kind}")
        results[kind] = ended(lambda config=config: train(config, resume=run))  # type: ignore[misc]
    return results


def stops(output: Path) -> dict[str, Any]:
    """What goes wrong in one process alone."""
    results = {}
    at(5, nan)
    results["nan"] = ended(lambda: train(helpers.config(output / "nan")))
    for kind in ("ddp", "fsdp"):
        at(5, out_of_memory)
        config = helpers.config(output / "memory" / kind, f"training.data_parallel={kind}")
        results[f"memory {kind}"] = ended(lambda config=config: train_with_retries(config, 1))  # type: ignore[misc]
    at(5, bad_data)
    results["data"] = ended(lambda: train(helpers.config(output / "data", FSDP)))
    return results


def recursive(output: Path) -> dict[str, Any]:
    """Conversations and puzzles with embeddings; and the middle of a run that one process began."""
    seen: list[int] = []
    rows = ConversationFeed.rows

    def noted(self: ConversationFeed, numbers: Any) -> Any:
        seen.extend(numbers.tolist())
        return rows(self, numbers)

    ConversationFeed.rows = noted  # type: ignore[method-assign]
    train(recursive_config("conversations", output / "conversations" / "two"))
    ConversationFeed.rows = rows  # type: ignore[method-assign]
    for kind in ("puzzles", "frozen"):
        train(recursive_config(kind, output / kind / "two"))
    (run,) = (output / "recursive legs").glob("*/*")
    at(9, sigterm)
    config = recursive_config("conversations", output / "recursive legs")
    return {"seen": seen, "recursive leg": ended(lambda: train(config, resume=run))}


STUDENTS = {
    "direct": [],
    "cached": ["teacher.mode=cached", "teacher.cache={}/cache"],
    "recording": ["teacher.cache_logits=true", "teacher.cache={}/recorded"],
}


def student_config(kind: str, output: Path, home: Path) -> Config:
    words = [word.format(home) for word in STUDENTS[kind]]
    short = ["training.max_steps=6", "training.save_every=6"]
    return helpers_distill.config(output, home / "teacher", *short, *words)


def students(output: Path) -> dict[str, Any]:
    """Each way of asking a teacher, and sharded, in the processes of this run."""
    for kind in STUDENTS:
        train(student_config(kind, output / kind / "two", output))
    config = student_config("direct", output / "fsdp" / "two", output)
    training = config.training.model_copy(update={"data_parallel": "fsdp"})
    return {"fsdp": ended(lambda: train(config.model_copy(update={"training": training})))}


def main(output: Path, scenario: str, *words: str) -> int:
    torch.set_num_threads(1)
    if scenario == "command":
        at(5, bad_data)
        return cli.main(words)
    results: dict[str, Any] = {}
    legs_of = {"all": (same_as_one, legs, stops, recursive), "students": (students,)}
    for function in legs_of[scenario]:
        results |= function(output)
    (output / f"{RANK}.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
