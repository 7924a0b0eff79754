"""Distillation: the fused loss against the plain one, a cached teacher against one that is asked.

    python benchmarks/distill.py                     # all of it, on a CPU in about seven minutes
    python benchmarks/distill.py --only cache loader # some of it

The rival of the loss is ``distill_losses.plain``: logits, softmax, gather, in plain torch. Before
anything is timed the two must give the same loss and gradients, or there is no table. Contestants
take turns within a round and figures are medians over the rounds; memory is measured in a process
for each. Text, teachers and targets are made on the spot (``distill_data.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import distill_data as made
import distill_losses as losses
import numpy as np
import torch

from thimble.config.load import load
from thimble.teachers.cache import TeacherCache
from thimble.tokens.packed import PackedChunks
from thimble.training import devices
from thimble.training.data import open_data
from thimble.training.distributed import Processes
from thimble.training.loop import Trainer

PARTS = ("loss", "step", "cache", "loader")
POSITIONS, VOCABULARIES = (1024, 4096, 8192), (32_000, 128_256)
# Positions and vocabulary at which the widths are compared, and the memory of every way is known.
WIDE_AT = (4096, 32_000)
TEACHERS = ("slm_nano", "slm_tiny")
# Shares of the plain loss's, the memory at WIDE_AT's positions; a cached step's speed beside one
# that asks; tokens a second and core.
TIME_AIM, MEMORY_AIM, CACHED_AIM = 0.6, 0.1, 1.7
CACHE_AIM, LOADER_AIM = 200_000, 5_000_000


# --- the loss


def compare_losses(
    shapes: list[tuple[int, int, int]], rounds: int, device: torch.device, arguments: list[str]
) -> list[str]:
    """A line for each (positions, vocabulary, width)."""
    dtype = devices.resolve_precision("auto", device)
    lines = [
        "| positions | vocabulary | width | plain, s (from, to) | fused, s (from, to) | time | "
        "plain, MB | fused, MB | memory | aims missed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape in shapes:
        ways = ["fused", "plain"]
        room = devices.available_memory(device)
        needed = losses.needed_bytes(*shape[:2])
        if needed > 0.8 * room:
            ways.remove("plain")
        memory: dict[str, int] = {}
        for way in list(ways):
            peak = measure_memory(way, shape, arguments)
            if peak is None:
                ways.remove(way)
            else:
                memory[way] = peak
        problem = losses.Problem(*shape, dtype, device)
        took: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in ways:
                took[way].append(losses.seconds(way, problem, device))
                progress(f"{way} at {shape}, round {number}: {took[way][-1]:.3f} s")
        cells = [f"{shape[0]:,}", f"{shape[1]:,}", str(shape[2])]
        if "plain" in ways:
            time_share = ratio(took, "fused", "plain")
            memory_share = memory["fused"] / memory["plain"]
            cells += [spread(took["plain"]), spread(took["fused"]), f"{time_share:.2f}"]
            cells += [f"{memory[way] / 1e6:,.0f}" for way in ("plain", "fused")]
            missed = ["time"] * (time_share > TIME_AIM)
            missed += ["memory"] * (shape[0] == WIDE_AT[0] and memory_share > MEMORY_AIM)
            cells += [f"{memory_share:.3f}", ", ".join(missed) or "none"]
        else:
            why = "out of memory"
            if needed > 0.8 * room:
                why = f"not run: {needed / 1e9:.0f} GB of {room / 1e9:.0f}"
            cells += [why, spread(took["fused"]), "", "", f"{memory['fused'] / 1e6:,.0f}", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
        del problem
    return lines


def measure_memory(way: str, shape: tuple[int, int, int], arguments: list[str]) -> int | None:
    """Peak bytes of one loss, forward and backward, in a process of its own; None when there are
    too few."""
    command = [sys.executable, __file__, *arguments, "--memory-of", way, *map(str, shape)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode == -signal.SIGKILL:  # what the system does to who takes too much
        return None
    result.check_returncode()
    found: int | None = json.loads(result.stdout.splitlines()[-1])["bytes"]
    progress(f"memory of {way} at {shape}: {found} bytes")
    return found


def memory_of(way: str, shape: tuple[int, int, int], device: torch.device) -> None:
    """Print what the loss and its gradients took at most, beyond hidden states and head."""
    dtype = devices.resolve_precision("auto", device)
    losses.seconds(way, losses.Problem(64, 500, 64, dtype, device), device)  # what libraries load
    problem = losses.Problem(*shape, dtype, device)
    losses.synchronize(device)
    devices.reset_peak_memory(device)
    before = devices.memory_bytes(device)
    found = None
    with contextlib.suppress(torch.OutOfMemoryError):
        losses.seconds(way, problem, device)
        found = devices.memory_bytes(device) - before
    print(json.dumps({"bytes": found}))


# --- a training step


def compare_steps(rounds: int, steps: int, device: torch.device, folder: Path) -> list[str]:
    """The recipe distill_nano with a teacher of either shape, asked or cached; and without one."""
    from thimble.teachers.direct import open_direct
    from thimble.teachers.examples import open_examples
    from thimble.teachers.fill import fill
    from thimble.training.distillation import asked_of

    base = load("distill_nano", ["data.path=x", "teacher.path=x"])
    length, vocabulary = base.training.sequence_length, base.model.vocab_size
    tokenizer = made.make_tokenizer(folder / "tokenizer", vocabulary)
    rows = 8 * base.training.micro_batch_size
    data = made.make_packed(folder / "data", tokenizer, vocabulary, rows * length, length)
    common = [f"data.path={data}", f"device={device}", f"output_dir={folder / 'runs'}"]
    runs: dict[str, Callable[[], float]] = {}
    runs["no teacher"] = run_of([*common, "objective.name=next_token"], "distill_nano", device)
    for shape in TEACHERS:
        teacher = made.make_teacher(folder / shape, tokenizer, shape, vocabulary)
        told = [*common, f"teacher.path={teacher}"]
        config = load("distill_nano", told)
        examples = open_examples(str(data), "train", length)
        found = open_direct(teacher, examples, asked_of(config), device=device)
        filled = fill(folder / f"{shape}-cache", examples, found)
        progress(f"{shape} said {filled.positions_per_second:,.0f} positions a second")
        runs[f"{shape}, asked"] = run_of(told, "distill_nano", device)
        cached = [*told, "teacher.mode=cached", f"teacher.cache={filled.path}"]
        runs[f"{shape}, cached"] = run_of(cached, "distill_nano", device)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first one warms up
        for name, run in runs.items():
            each = [run() for _ in range(steps if number else 2)]
            if number:
                took[name].append(statistics.mean(each))
            progress(f"step, {name}, round {number}: {statistics.mean(each) * 1e3:.1f} ms")
    tokens = base.training.micro_batch_size * length
    lines = [
        "| teacher | ms a step (from, to) | tokens/s | asked is slower by | aim |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in took.items():
        times = aim = ""
        if name.endswith("cached"):
            slower = ratio(took, name.replace("cached", "asked"), name)
            times, aim = f"{slower:.2f} x", met(slower, CACHED_AIM)
        lines.append(
            f"| {name} | {spread(values, 1e3)} | {tokens / statistics.median(values):,.0f} | "
            f"{times} | {aim} |"
        )
    return lines


def run_of(overrides: list[str], recipe: str, device: torch.device) -> Callable[[], float]:
    """Seconds of a step of a run."""
    config = load(recipe, [*overrides, "training.compile=off"])
    trainer = Trainer(config, open_data(config), device, Processes())

    def step() -> float:
        losses.synchronize(device)
        started = time.perf_counter()
        trainer.step()
        losses.synchronize(device)
        return time.perf_counter() - started

    return step


# --- the cache and the loader


def measure_caches(rounds: int, folder: Path) -> list[str]:
    """Rows read in any order, by one thread, their bytes in the page cache."""
    lines = [
        "| vocabulary | tokens kept | bytes a position | positions/s (from, to) | MB/s | aim |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    length, batch = 1024, 4
    for vocabulary, k in ((4096, 64), (128_256, 64), (128_256, 128), (128_256, 512)):
        rows = max(2 * batch, 128_000_000 // (6 * k * length))
        cache = made.make_cache(folder / f"{vocabulary}-{k}", vocabulary, k, rows, length)
        rates = read_rates(cache, rounds, batch)
        size = cache.position_bytes
        lines.append(
            f"| {vocabulary:,} | {k} | {size} | {rate(rates)} | "
            f"{statistics.median(rates) * size / 1e6:,.0f} | "
            f"{met(statistics.median(rates), CACHE_AIM)} |"
        )
        progress(lines[-1])
    return lines


def read_rates(cache: TeacherCache, rounds: int, batch: int) -> list[float]:
    draw, rates = np.random.default_rng(0), []
    for number in range(rounds + 1):  # the first one warms up
        order = draw.permutation(cache.count)
        order = order[: len(order) // batch * batch].reshape(-1, batch)
        started = time.process_time()
        for numbers in order:
            cache.read(numbers)
        if number:
            rates.append(order.size * cache.length / (time.process_time() - started))
    return rates


def measure_loader(rounds: int, folder: Path) -> list[str]:
    """Batches of packed chunks in the shuffled order of training, by one thread."""
    lines = [
        "| tokens a chunk | chunks a batch | the first epoch, tokens/s | tokens/s (from, to) | "
        "aim |",
        "| --- | --- | --- | --- | --- |",
    ]
    vocabulary = 128_256
    tokenizer = made.make_tokenizer(folder / "words", vocabulary)
    for length, batch in ((256, 64), (1024, 16), (8192, 2)):
        path = made.make_packed(
            folder / f"chunks-{length}", tokenizer, vocabulary, 3_000_000, length
        )
        rates = []
        for _ in range(rounds):
            chunks = PackedChunks(path)
            for epoch in range(3):  # the first one decodes, the others find all decoded
                started, steps = time.process_time(), len(chunks) // batch
                for step in range(steps):
                    found = chunks.batch(epoch * len(chunks) + step * batch, batch)
                    found.targets  # noqa: B018
                rates.append(steps * batch * length / (time.process_time() - started))
        first = [value for place, value in enumerate(rates) if place % 3 == 0]
        later = [value for place, value in enumerate(rates) if place % 3]
        aim = met(statistics.median(first), LOADER_AIM)
        lines.append(f"| {length:,} | {batch} | {rate(first)} | {rate(later)} | {aim} |")
        progress(lines[-1])
    return lines


# --- the table


def spread(values: list[float], times: float = 1.0) -> str:
    digits = 1 if times > 1 else 3
    low, middle, high = (times * f(values) for f in (min, statistics.median, max))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def rate(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def ratio(took: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds: within a round both met the same machine."""
    return statistics.median(a / b for a, b in zip(took[one], took[other], strict=True))


def met(figure: float, aim: float) -> str:
    return "met" if figure >= aim else "MISSED"


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--width", type=int, help="of the loss: 192 on a CPU, 1152 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="training steps a round")
    parser.add_argument("--device", default="auto")
    default = Path(__file__).parent / "results" / "distill.md"
    parser.add_argument("--output", type=Path, default=default, help="where the table is written")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = devices.resolve_device(options.device)
    if options.memory_of:
        way, *shape = options.memory_of
        positions, vocabulary, width = map(int, shape)
        memory_of(way, (positions, vocabulary, width), device)
        return
    logging.getLogger("thimble").setLevel(logging.WARNING)
    gpu = device.type == "cuda"
    width = options.width or (1152 if gpu else 192)
    command = " ".join(["python", "benchmarks/distill.py", *sys.argv[1:]])
    began = time.monotonic()
    lines = [
        "# Distillation: the loss, a step, the cache, the loader",
        "",
        f"{time.strftime('%Y-%m-%d')}. {devices.describe(device)}, load "
        f"{os.getloadavg()[1]:.1f} over five minutes before; Python {platform.python_version()}, "
        f"torch {torch.__version__}.",
        "",
        f"`{command}`: medians of {options.rounds} rounds in which the contestants take turns; "
        "ratios are medians of each round's own.",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "loss" in options.only:
            dtype = str(devices.resolve_precision("auto", device)).split(".")[1]
            same = losses.check(width, device)
            shapes = [(n, v, width) for v in VOCABULARIES for n in POSITIONS]
            shapes += [(*WIDE_AT, wide) for wide in (512, 960, 1152) if wide != width]
            lines += [
                "",
                "## Head, cross-entropy and divergence from a teacher",
                "",
                f"Forward and backward of alpha {losses.ALPHA}, temperature "
                f"{losses.TEMPERATURE:g}, {losses.TOKENS} tokens of the teacher a position, "
                f"{dtype}. Plain: logits, softmax and gather in torch. Both are {same}. Memory is "
                "the peak beyond hidden states and head, gradients of both included. Aims: "
                f"{TIME_AIM} of the time, {MEMORY_AIM} of the memory at {WIDE_AT[0]:,} positions. "
                "The head's three matrix products "
                "are the same for both and grow with the width, which the last rows show.",
                "",
                *compare_losses(shapes, options.rounds, device, ["--device", str(device)]),
            ]
        if "step" in options.only:
            lines += [
                "",
                "## A step with a teacher that is asked, and with a cache of it",
                "",
                "`distill_nano`: retnet_nano, 16 x 256 tokens a step, Muon, the likeliest 64 tokens"
                f"; {options.steps} steps a round. Teachers of the shapes of "
                f"{' and '.join(TEACHERS)}, with random weights and the student's vocabulary of "
                f"4,096. Aim: cached {CACHED_AIM} times as fast.",
                "",
                *compare_steps(options.rounds, options.steps, device, folder),
            ]
        with one_thread():
            if "cache" in options.only:
                lines += [
                    "",
                    "## Reading the cache",
                    "",
                    "One thread, by its CPU time; 4 rows of 1,024 positions at a time, in random "
                    "order, checksums compared, as int64 and float32 tensors. Aim: "
                    f"{CACHE_AIM:,} positions a second.",
                    "",
                    *measure_caches(options.rounds, folder),
                ]
            if "loader" in options.only:
                lines += [
                    "",
                    "## Loading packed chunks",
                    "",
                    "One thread, by its CPU time; 3 million tokens of a vocabulary of 128,256, "
                    "shuffled, with shifted targets and the starts of documents. Aim: "
                    f"{LOADER_AIM:,} tokens a second, in the first epoch too.",
                    "",
                    *measure_loader(options.rounds, folder),
                ]
    lines += ["", f"All of it took {(time.monotonic() - began) / 60:.1f} minutes."]
    table = "\n".join(lines) + "\n"
    print(table)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(table)


if __name__ == "__main__":
    main()
