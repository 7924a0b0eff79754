"""The recursive model: cached generation against recomputing, a training step against a plain one.

    python benchmarks/recursion.py                         # a size for two CPU cores, minutes
    python benchmarks/recursion.py --published --compiled  # the published size, for a GPU

The rival is ``plain_recursion.py``: the same algorithm in eager PyTorch as the papers write it.
Before anything is timed the two must give the same loss, gradients and logits in float32, or there
is no table. Contestants take turns within a round and figures are
medians over the rounds; memory is measured in a process for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from recursion_contestants import (
    ANSWER,
    PROMPT,
    WAYS,
    Clock,
    Generation,
    Plain,
    Thimble,
    contestant,
    draw_batches,
    make_model,
    make_plain,
    make_rows,
    model_config,
    padded,
)

from thimble.config.load import load
from thimble.config.model import ModelConfig
from thimble.models.attention import KVCache
from thimble.objectives.act import Rows
from thimble.objectives.linear_cross_entropy import IGNORE
from thimble.training import devices

# --- both compute the same


def check_training(config: ModelConfig, rows: Rows, device: torch.device) -> str:
    """Loss and gradients of both on the same rows in float32, with either cross-entropy; one line
    on how near they are. Raises RuntimeError when they are not the same."""
    worst = {"loss": 0.0, "gradient": 0.0}
    for form in ("stablemax", "softmax"):
        losses, gradients = [], []
        for one, its_rows in (
            (Plain(make_plain(config, torch.float32, device), form),
             padded(rows, config.max_position_embeddings)),
            (Thimble(make_model(config, torch.float32, device), form), rows),
        ):  # fmt: skip
            loss = one.loss(its_rows)
            loss.backward()
            losses.append(loss.item())
            gradients.append(
                {n: p.grad for n, p in one.model.named_parameters() if p.grad is not None}
            )
        plain, ours = gradients
        assert plain.keys() == ours.keys()
        apart = abs(losses[0] - losses[1]) / losses[0]
        worst["loss"] = max(worst["loss"], apart)
        for name, gradient in plain.items():
            apart = float((ours[name] - gradient).norm() / gradient.norm())
            worst["gradient"] = max(worst["gradient"], apart)
    if not (worst["loss"] < 1e-5 and worst["gradient"] < 1e-3):
        raise RuntimeError(f"thimble and the plain form differ: {worst}; times mean nothing.")
    return (
        f"loss equal to {worst['loss']:.0e}, the gradient of every parameter to "
        f"{worst['gradient']:.0e} of its norm, in float32, with stablemax and with softmax"
    )


@torch.inference_mode()
def check_generation(config: ModelConfig, device: torch.device) -> str:
    """The logits of cached generation, a position at a time, beside those of the whole window."""
    model = make_model(config, torch.float32, device)
    plain = make_plain(config, torch.float32, device)
    count = config.max_position_embeddings
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, count), generator=draw).to(device)
    z_H, z_L = plain.initial(2, count)
    for _ in range(config.halt_max_steps):
        z_H, z_L, logits = plain.step(z_H, z_L, ids)
    state = model.new_state(2, count)
    one_by_one = torch.cat([model(one, state) for one in ids.split(1, dim=1)], dim=1)
    apart = float((one_by_one - logits).abs().max() / logits.std())
    if not apart < 1e-3:
        raise RuntimeError(f"cached logits differ by {apart}; times mean nothing.")
    return f"cached logits, one of {count} positions after the other, to {apart:.0e} of their size"


# --- generation


def compare_generation(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, rounds: int
) -> list[str]:
    lines = [
        "| tokens | sequences | cached, tokens/s | whole window anew | what is known anew | cached "
        "is | caches |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    length = config.max_position_embeddings
    for count in (length // 4, length):
        for batch in (1, 8):
            ways = Generation(config, count, batch, dtype, device)
            ways.cached(1)
            found = []
            for number in range(rounds):
                found.append([batch / way() for way in (ways.cached, ways.window, ways.known)])
                progress(f"generation, {count} tokens, {batch} sequences: {found[-1]}, {number}")
            fast, window, known = (statistics.median(each) for each in zip(*found, strict=True))
            caches = [cache for cache in ways.state if isinstance(cache, KVCache)]
            size = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
            lines.append(
                f"| {count} | {batch} | {fast:.1f} | {window:.2f} | {known:.2f} | "
                f"{fast / window:.0f} x, {fast / known:.0f} x | {size / 1e6:,.0f} MB in "
                f"{len(caches)} |"
            )
    return lines


# --- training


def first_rows(rows: Rows, count: int) -> Rows:
    return Rows(**{field.name: getattr(rows, field.name)[:count] for field in fields(Rows)})


def compare_training(
    arguments: list[str],
    config: ModelConfig,
    batches: list[Rows],
    dtype: torch.dtype,
    device: torch.device,
    ways: list[str],
    rounds: int,
) -> list[str]:
    memory = {way: measure_memory(way, arguments) for way in ways}
    steps = {way: contestant(way, config, dtype, device) for way in ways if memory[way] is not None}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(rounds + 1):  # the first one warms up
        for way, step in steps.items():
            clock = Clock(device)
            for rows in batches:
                step(rows)
            seconds[way].append(clock.seconds() / len(batches))
            progress(f"training, {way}: {seconds[way][-1]:.2f} s, round {number} of {rounds}")
    lines = [
        "| | s a step (from, to) | peak MB | time | memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way, peak in memory.items():
        name = WAYS[way].format(length=config.max_position_embeddings)
        if peak is None:
            lines.append(f"| {name} | out of memory | | | |")
            continue
        took, ratios = seconds[way][1:], ["", ""]
        if (rival := memory["plain"]) is not None:
            plain_took = statistics.median(seconds["plain"][1:])
            ratios = [f"{statistics.median(took) / plain_took:.2f}", f"{peak / rival:.2f}"]
        lines.append(
            f"| {name} | {statistics.median(took):.3f} ({min(took):.3f} to {max(took):.3f}) | "
            f"{peak / 1e6:,.0f} | {ratios[0]} | {ratios[1]} |"
        )
    return lines


def measure_memory(way: str, arguments: list[str]) -> int | None:
    """Peak bytes of one contestant's steps in a process of its own; None when there are too few."""
    command = [sys.executable, __file__, *arguments, "--memory-of", way]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode == -signal.SIGKILL:  # what the system does to who takes too much
        return None
    result.check_returncode()
    found = json.loads(result.stdout.splitlines()[-1])["bytes"]
    progress(f"memory of {way}: {found} bytes")
    return found


def memory_of(
    way: str, config: ModelConfig, batches: list[Rows], dtype: torch.dtype, device: torch.device
) -> None:
    """Print what model, optimizer and steps needed at most, beyond what the process had before."""
    before = 0
    if device.type == "cpu":
        tiny = model_config(64, 64, 64, 1)  # what the libraries load at their first step
        contestant(way, tiny, dtype, device)(draw_batches(tiny, 1, 1, device)[0])
        devices.reset_peak_memory(device)
        before = devices.memory_bytes(device)
    found = None
    with contextlib.suppress(torch.OutOfMemoryError):
        step = contestant(way, config, dtype, device)
        for rows in batches:
            step(rows)
        found = devices.memory_bytes(device) - before
    print(json.dumps({"bytes": found}))


# --- puzzles


def measure_sudoku(dtype: torch.dtype, device: torch.device, rounds: int) -> list[str]:
    """Steps per second of thimble at the recipe's shape and batch, attention and MLP."""
    lines = [
        "| | steps/s | puzzles/s | peak MB |",
        "| --- | --- | --- | --- |",
    ]
    draw = torch.Generator().manual_seed(0)
    batch = load("puzzle_sudoku").training.micro_batch_size
    inputs, labels = (torch.randint(1, 11, (batch, 81), generator=draw) for _ in range(2))
    rows = make_rows(inputs.numpy(), labels.numpy(), np.zeros(batch, dtype=np.int64), device)
    for mixer in ("attention", "mlp"):
        for compiled in (False, True):
            shape = load("puzzle_sudoku", [f"model.mixer={mixer}"]).model
            model = make_model(shape, dtype, device)
            step = Thimble(model, "stablemax", compiled=compiled).step
            for _ in range(3):
                step(rows)
            devices.reset_peak_memory(device)
            rates = []
            for _ in range(rounds):
                clock = Clock(device)
                for _ in range(10):
                    step(rows)
                rates.append(10 / clock.seconds())
            rate = statistics.median(rates)
            name = f"{mixer}, {'compiled' if compiled else 'eager'}"
            peak = devices.memory_bytes(device) / 1e6
            lines.append(f"| {name} | {rate:.2f} | {rate * batch:,.0f} | {peak:,.0f} |")
            progress(lines[-1])
            del model, step
    return lines


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", action="store_true", help="d 512, batch 48, 16 steps")
    parser.add_argument("--width", type=int, default=256, help="of the model that is trained")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--steps", type=int, default=4, help="supervision steps of a generated token"
    )
    parser.add_argument("--batches", type=int, default=3, help="batches a round of training")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also thimble with torch.compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="write the table there as well")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.published:
        options.width, options.batch, options.steps = 512, 48, 16
    device = devices.resolve_device(options.device)
    dtype = devices.resolve_precision("auto", device)
    config = model_config(options.width, options.vocab, options.length, options.steps)
    batches = draw_batches(config, options.batch, options.batches, device)
    if options.memory_of:
        memory_of(options.memory_of, config, batches, dtype, device)
        return

    ways = [way for way in WAYS if way != "thimble-compiled" or options.compiled]
    same = check_training(config, first_rows(batches[0], 4), device)
    progress(same)
    same_tokens = check_generation(
        config.model_copy(update={"max_position_embeddings": 24}), device
    )
    progress(same_tokens)
    training = compare_training(sys.argv[1:], config, batches, dtype, device, ways, options.rounds)
    speaker = model_config(512, options.vocab, options.length, options.steps)
    generation = compare_generation(speaker, dtype, device, options.rounds)
    widths = [rows.inputs.shape[1] for rows in batches]
    labelled = sum(int((rows.labels != IGNORE).sum()) for rows in batches)
    given = sum(widths) * options.batch
    command = " ".join(["python", "benchmarks/recursion.py", *sys.argv[1:]])
    lines = [
        "# Recursion: cached generation, and a training step against a plain one",
        "",
        f"{time.strftime('%Y-%m-%d')}. {devices.describe(device)}, load "
        f"{os.getloadavg()[1]:.1f} over five minutes; Python {platform.python_version()}, torch "
        f"{torch.__version__}.",
        "",
        f"`{command}`: width {config.hidden_size}, {config.num_hidden_layers} layers, H "
        f"{config.H_cycles}, L {config.L_cycles}, vocabulary {config.vocab_size:,}, "
        f"{config.num_parameters:,} parameters, {str(dtype).split('.')[1]}, medians of "
        f"{options.rounds} rounds.",
        "",
        f"Both compute the same: {same}; {same_tokens}.",
        "",
        "## Generating",
        "",
        f"Width {speaker.hidden_size}, {speaker.halt_max_steps} supervision steps for every token; "
        "tokens a second of all sequences together, as a mean over places in so many tokens. "
        f"The plain form computes its whole window of {options.length} positions and all their "
        "logits anew, as the published generation does; thimble without caches the positions known "
        "so far, with one row of logits.",
        "",
        *generation,
        "",
        "## A training step",
        "",
        f"Forward, backward, Adam-atan2 and moving average, of {options.batch} conversations of "
        f"random words. Their lengths are assumed, not counted in a data set: log-normal, prompts "
        f"with median {PROMPT[0]} tokens and answers with {ANSWER[0]} (deviations of the logarithm "
        f"{PROMPT[1]} and {ANSWER[1]}), cut to {config.max_position_embeddings}. They are sorted "
        f"into batches as thimble's loader does it; {len(batches)} of them, "
        f"{', '.join(map(str, widths))} wide, {labelled / given:.0%} of their positions labelled, "
        "go to everybody. Cross-entropy is stablemax unless said otherwise. Memory is the peak of "
        "weights, optimizer and steps together.",
        "",
        *training,
    ]
    if device.type == "cuda":
        lines += ["", "## puzzle_sudoku", "", *measure_sudoku(dtype, device, options.rounds)]
    table = "\n".join(lines) + "\n"
    print(table)
    if options.output:
        options.output.write_text(table)


if __name__ == "__main__":
    main()
