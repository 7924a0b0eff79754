"""A few real steps of a run, in a process of their own: how long they take and what memory.

    thimble plan -> probe(config) -> python -m thimble.training.probe < configuration -> JSON

In a process of its own a step that does not fit kills nobody else, and the memory of what ran
before is not counted.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thimble.config.schema import Config, DataConfig, DatasetConfig
from thimble.console import progress
from thimble.conversations.dataset import EXAMPLE, Conversations
from thimble.training import devices
from thimble.training.data import open_data

STEPS = 4  # timed, after one that warms up
LONGEST = (
    20.0  # seconds that a probed step may take on a CPU, or it is not run; then no more are begun
)
CPU_FLOPS = 1e11  # assumed before anything was measured, to know which steps are short enough


def probe(config: Config, micro_batches: list[int], flops_per_token: float) -> list[dict[str, Any]]:
    """Real steps at each of these micro-batch sizes, ascending, of one pass each.

    Returns for each that could be run ``micro_batch_size``, ``seconds`` a pass and its update take,
    and ``peak_bytes``; ends with the first that fails or takes too long, which then has a
    ``problem`` instead.
    """
    found: list[dict[str, Any]] = []
    config = _alike(config)
    device = devices.resolve_device(config.device)
    with progress("plan: real steps", len(micro_batches), "micro-batches") as advance:
        for micro in micro_batches:
            tokens = micro * config.training.sequence_length
            expected = tokens * flops_per_token / CPU_FLOPS
            if found:
                expected = found[-1]["seconds"] * micro / found[-1]["micro_batch_size"]
            if device.type == "cpu" and expected > LONGEST:
                problem = f"a pass of {micro} windows would take about {expected:,.0f} s"
                return [*found, {"micro_batch_size": micro, "problem": problem}]
            training = config.training.model_copy(
                update={"micro_batch_size": micro, "gradient_accumulation_steps": 1}
            )
            one = config.model_copy(update={"training": training})
            found.append({"micro_batch_size": micro, **_run(one.model_dump_json())})
            advance(1)
            if "problem" in found[-1]:
                break
    return found


def _alike(config: Config) -> Config:
    """The same steps, and the same words for them: of conversations whichever they are."""
    training = config.training.model_copy(
        update={"load_checkpoint": None, "init_from_teacher": False}
    )
    teacher = config.teacher.model_copy(update={"cache_logits": False})  # nothing is kept of it
    changed: dict[str, Any] = {"training": training, "teacher": teacher}
    if config.data.path is None or isinstance(open_data(config), Conversations):
        made_up = DatasetConfig(name="made up", seq_len=training.sequence_length)
        changed |= {"data": DataConfig(), "dataset": made_up, "recipe": "probe"}
    return config.model_copy(update=changed)


@functools.lru_cache  # stages of a run differ in their data only
def _run(config: str) -> dict[str, Any]:
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    answer = subprocess.run(
        [sys.executable, "-m", "thimble.training.probe"],
        input=config,
        capture_output=True,
        text=True,
        env={**os.environ, **alone},
    )
    if answer.returncode == 0:
        return json.loads(answer.stdout.splitlines()[-1])
    if answer.returncode == -9 or "out of memory" in answer.stderr.lower():
        return {"problem": "out of memory"}
    return {"problem": (answer.stderr.strip().splitlines() or ["it failed"])[-1]}


class Longest(Conversations):
    """Conversations of random tokens, all as long as they may be, half of each an answer: what a
    step takes at most, whether there are real ones or not yet."""

    def __init__(self, config: Config) -> None:
        count, length = 64 * config.training.micro_batch_size, config.training.sequence_length
        draw = np.random.default_rng(config.seed)
        self.directory = Path("made up")
        self.vocab_size, self.seq_len = config.model.vocab_size, length
        self.pad_id = self.end_id = 0
        self.manifest: dict[str, Any] = {"fingerprint": "made up"}
        prompt = max(length // 2, 1)
        self.ids = draw.integers(0, self.vocab_size, count * (length + 1), dtype=np.uint32)
        self.labels = np.tile(np.arange(length + 1) >= prompt, count).astype(np.uint8)
        self.examples = np.zeros(count, dtype=EXAMPLE)
        self.examples["start"] = np.arange(count) * (length + 1)
        self.examples["length"], self.examples["prompt"] = length + 1, prompt
        self.examples["weight"] = 1

    def tokenizer(self) -> Any:
        return None  # nothing is said in a probe


def main() -> None:
    """Read a configuration from standard input, take steps, print what they took."""
    from thimble.training.distributed import Processes
    from thimble.training.loop import Trainer

    config = Config.model_validate_json(sys.stdin.read())
    device = devices.resolve_device(config.device)
    data = Longest(config) if config.data.path is None else open_data(config)
    trainer = Trainer(config, data, device, Processes())
    devices.reset_peak_memory(device)
    seconds: list[float] = []
    # The first warms up and compiles, so at least one more is timed.
    while len(seconds) < 2 or (len(seconds) < 1 + STEPS and sum(seconds[1:]) < LONGEST):
        started = time.perf_counter()
        trainer.step()
        trainer.norm.item()  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    memory = devices.memory_bytes(device)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak_bytes": memory}))


if __name__ == "__main__":
    main()
