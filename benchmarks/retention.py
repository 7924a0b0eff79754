"""Retention: its forms against attention, training and decoding, from 1,024 positions to 32,768.

    python benchmarks/retention.py

The rival is torch's ``scaled_dot_product_attention``; on a GPU flash-linear-attention's kernels
take part where they are installed. Before anything is timed the forms must agree, or there is no
table. Contestants take turns within a round and figures are medians over the rounds. What would
need more memory than there is, or more than ``SECONDS`` for one try, is not run and says so.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thimble.config.load import load
from thimble.config.model import ModelConfig
from thimble.models import retention
from thimble.models.causal_lm import CausalLM
from thimble.models.retention import Retained, RetentionState
from thimble.objectives.next_token import NextToken
from thimble.training import devices

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
SECONDS = 20.0
# Heads, width of one, and sequences: of the mixers alone.
SHAPES = {"cpu": (4, 64, 1), "cuda": (12, 96, 4)}
TOKENS = 8  # generated at a place
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


# --- the mixers


def mixers(log_gamma: Tensor, device: torch.device) -> dict[str, Form]:
    """q, k, v [B, H, T, C] -> [B, H, T, C]; all but attention compute the same."""

    def of(form: Callable[..., Retained], **options: Any) -> Form:
        return lambda q, k, v: form(q, k, v, log_gamma, **options).outputs

    found: dict[str, Form] = {
        "attention": functools.partial(F.scaled_dot_product_attention, is_causal=True),
        "parallel": of(retention.parallel),
        "chunkwise, 64": of(retention.chunkwise, chunk=64),
        "chunkwise, 128": of(retention.chunkwise, chunk=128),
        "recurrent": of(retention.recurrent),
    }
    kernels = retention.find_kernels() if device.type == "cuda" else None
    if kernels is not None:
        found["flash-linear-attention"] = of(functools.partial(retention.with_kernels, kernels))
    return found


def needed_bytes(name: str, shape: tuple[int, int, int, int], size: int) -> int:
    """What the forms keep for the backward pass beyond q, k and v, roughly: T x T weights, or a
    memory for each position."""
    batch, heads, time_, width = shape
    if name == "parallel":
        return 4 * size * batch * heads * time_**2
    if name == "recurrent":
        return 3 * 4 * batch * heads * time_ * width**2
    return 0


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator) for _ in range(3)]
    parts[0] *= shape[-1] ** -0.5
    return [x.to(device, dtype).requires_grad_() for x in parts]


def check(device: torch.device) -> str:
    """One line on how near the forms are in float32. Raises RuntimeError when they differ."""
    log_gamma = gammas(4, device)
    parts = draw((2, 4, 300, 32), torch.float32, device)
    forms = {
        name: form
        for name, form in mixers(log_gamma, device).items()
        if name not in ("attention", "flash-linear-attention")  # half precision only
    }
    results = {}
    for name, form in forms.items():
        made = form(*parts)
        results[name] = [made, *torch.autograd.grad(made.square().sum(), parts)]
    worst = 0.0
    for mine in results.values():
        for one, other in zip(mine, results["parallel"], strict=True):
            worst = max(worst, float((one - other).detach().norm() / other.detach().norm()))
    if not worst < 1e-5:
        raise RuntimeError(f"The forms differ by {worst} of their norm; times mean nothing.")
    return f"outputs and gradients of all forms to {worst:.0e} of their norm, in float32"


def gammas(heads: int, device: torch.device) -> Tensor:
    horizons = 32.0 * 2048.0 ** torch.linspace(0, 1, heads)
    return torch.log1p(-1 / horizons).to(device)


def compare_mixers(
    lengths: list[int], rounds: int, dtype: torch.dtype, device: torch.device
) -> list[str]:
    heads, width, batch = SHAPES[device.type]
    forms = mixers(gammas(heads, device), device)
    lines = [
        f"| positions | {' | '.join(forms)} | attention to chunkwise, 64 |",
        f"| --- |{' --- |' * (len(forms) + 1)}",
    ]
    slow: dict[str, float] = {}  # the last length's seconds
    for length in lengths:
        shape = (batch, heads, length, width)
        parts = draw(shape, dtype, device)
        room = devices.available_memory(device)
        cells: dict[str, str] = {}
        took: dict[str, list[float]] = {}
        for name in forms:
            needed = needed_bytes(name, shape, parts[0].element_size())
            if needed > 0.5 * room:
                cells[name] = f"{needed / 1e9:.0f} GB"
            elif slow.get(name, 0.0) > SECONDS / 3:
                cells[name] = "too slow"
            else:
                took[name] = []
        for number in range(rounds + 1):  # the first one warms up
            for name, values in took.items():
                if number > 1 and values[0] > SECONDS / 4:
                    continue  # one of so many seconds is enough
                seconds = step_seconds(forms[name], parts, device)
                if number or seconds > SECONDS / 4:
                    values.append(seconds)
                progress(f"{name} at {length}: {seconds * 1e3:.1f} ms")
        for name, values in took.items():
            slow[name] = statistics.median(values)
            cells[name] = spread(values, 1e3)
        pair = [slow[name] for name in ("attention", "chunkwise, 64") if name in took]
        times = f"{pair[0] / pair[1]:.1f} x" if len(pair) == 2 else ""
        row = " | ".join(cells[name] for name in forms)
        lines.append(f"| {length:,} | {row} | {times} |")
    return lines


def step_seconds(form: Form, parts: list[Tensor], device: torch.device) -> float:
    """Forward and backward."""
    synchronize(device)
    started = time.perf_counter()
    form(*parts).sum().backward()
    synchronize(device)
    took = time.perf_counter() - started
    for part in parts:
        part.grad = None
    return took


# --- decoding


def make_models(device: torch.device, dtype: torch.dtype) -> dict[str, CausalLM]:
    """Three models of one width and depth that differ in their mixer alone."""
    width, layers, head = (256, 4, 64) if device.type == "cpu" else (1152, 15, 96)
    heads = width // head
    common: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head,
        "max_position_embeddings": LENGTHS[-1] + 1024,
    }
    configs = {
        "attention": ModelConfig(**common),
        "attention, one key for all heads": ModelConfig(**{**common, "num_key_value_heads": 1}),
        "retention": ModelConfig(**common, mixer="retention"),
    }
    models = {}
    for name, config in configs.items():
        model = CausalLM(config).initialize(torch.Generator().manual_seed(0)).to(device)
        model.compute_dtype = dtype
        models[name] = model.eval()
    return models


def compare_decoding(
    lengths: list[int], rounds: int, dtype: torch.dtype, device: torch.device
) -> list[str]:
    models = make_models(device, dtype)
    cells = [f"{name}, tokens/s | its state, MB" for name in models]
    lines = [
        f"| context | sequences | {' | '.join(cells)} | retention to attention |",
        f"| --- | --- |{' --- |' * (2 * len(models) + 1)}",
    ]
    for batch in (1, 8):
        for length in lengths:
            rates: dict[str, list[float]] = {name: [] for name in models}
            states = {name: state_at(model, batch, length) for name, model in models.items()}
            for number in range(rounds + 1):  # the first one warms up
                for name, model in models.items():
                    rate = batch / token_seconds(model, states[name], batch, length, device)
                    if number:
                        rates[name].append(rate)
            middle = {name: statistics.median(values) for name, values in rates.items()}
            row = [
                f"{middle[name]:,.0f} | {state_bytes(states[name]) / 1e6:,.2f}" for name in models
            ]
            lines.append(
                f"| {length:,} | {batch} | {' | '.join(row)} | "
                f"{middle['retention'] / middle['attention']:.1f} x |"
            )
            progress(lines[-1])
    return lines


def state_at(model: CausalLM, batch: int, length: int) -> list[Any]:
    """As if so many positions had been seen; what of them is kept makes no difference to time."""
    state = list(model.new_state(batch, length + TOKENS))
    for layer in state:
        layer.length = length
    return state


def state_bytes(state: list[Any]) -> int:
    return sum(
        layer.memory.nbytes
        if isinstance(layer, RetentionState)
        else layer.keys.nbytes + layer.values.nbytes
        for layer in state
    )


@torch.inference_mode()
def token_seconds(
    model: CausalLM, state: list[Any], batch: int, length: int, device: torch.device
) -> float:
    for layer in state:
        layer.length = length
    ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(TOKENS):
        ids = model(ids, state).argmax(-1)
    synchronize(device)
    return (time.perf_counter() - started) / TOKENS


# --- a step of the small models


def compare_small(rounds: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Forward and backward of retnet_nano, by its chunk, and of slm_nano."""
    ways = {"slm_nano": load("slm_nano").model}
    config = load("distill_nano", ["data.path=x"]).model
    for chunk in (32, 64, 128, 256):
        here = " (its own)" if chunk == config.retention_chunk else ""
        changed = config.model_copy(update={"retention_chunk": chunk})
        ways[f"retnet_nano, chunks of {chunk}{here}"] = changed
    objectives = {}
    for name, shape in ways.items():
        model = CausalLM(shape).initialize(torch.Generator().manual_seed(0)).to(device)
        model.compute_dtype = dtype
        objectives[name] = NextToken(model, compiled=False)
    ids = torch.randint(4096, (16, 257), generator=torch.Generator().manual_seed(0)).to(device)
    starts = torch.rand(16, 256, device=device) < 1 / 300
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, objective in objectives.items():
            documents = starts if ways[name].mixer == "retention" else None
            synchronize(device)
            started = time.perf_counter()
            objective(ids[:, :-1], ids[:, 1:], documents).backward()
            synchronize(device)
            if number:
                took[name].append(time.perf_counter() - started)
            objective.zero_grad(set_to_none=True)
    first = statistics.median(took["slm_nano"])
    lines = ["| | ms (from, to) | to slm_nano |", "| --- | --- | --- |"]
    for name, values in took.items():
        middle = statistics.median(values)
        lines.append(f"| {name} | {spread(values, 1e3)} | {middle / first:.2f} |")
    return lines


# --- the table


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float], times: float) -> str:
    low, middle, high = (times * f(values) for f in (min, statistics.median, max))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="positions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    default = Path(__file__).parent / "results" / "retention.md"
    parser.add_argument("--output", type=Path, default=default, help="where the table is written")
    options = parser.parse_args()
    device = devices.resolve_device(options.device)
    dtype = devices.resolve_precision("auto", device)
    lengths = [length for length in LENGTHS if length <= options.longest]
    heads, width, batch = SHAPES[device.type]
    began = time.monotonic()
    load_before = os.getloadavg()[1]
    same = check(device)
    progress(same)
    precision = str(dtype).split(".")[1]
    fla = "takes part" if retention.find_kernels() else "is not here, or there is no GPU for it"
    command = " ".join(["python", "benchmarks/retention.py", *sys.argv[1:]])
    lines = [
        "# Retention against attention",
        "",
        f"{time.strftime('%Y-%m-%d')}. {devices.describe(device)}, load {load_before:.1f} over "
        f"five minutes before; Python {platform.python_version()}, torch {torch.__version__}; "
        f"flash-linear-attention {fla}.",
        "",
        f"`{command}`: medians of {options.rounds} rounds in which the contestants take turns.",
        "",
        f"The same is computed: {same}.",
        "",
        "## Training",
        "",
        f"Milliseconds of forward and backward of the mixers alone: {batch} sequence"
        f"{'s' if batch > 1 else ''}, {heads} heads of {width}, {precision}. Attention is torch's "
        "scaled_dot_product_attention, causal. GB: so much a form would have to keep for its "
        "backward pass, more than half of what is free, so it was not run; too slow: the length "
        f"before took more than {SECONDS / 3:.0f} s.",
        "",
        *compare_mixers(lengths, options.rounds, dtype, device),
        "",
        "## Decoding",
        "",
        "Tokens a second of all sequences together, with so many positions behind them, by models "
        "of one width, depth and MLP; retention runs in its recurrent form. The state is what has "
        f"to be kept: keys and values, room for {TOKENS} more included, or retention's matrices.",
        "",
        *compare_decoding(lengths, options.rounds, dtype, device),
        "",
        "## A step of the small models",
        "",
        "Milliseconds of forward and backward, head and loss included, of 16 x 256 tokens.",
        "",
        *compare_small(3 * options.rounds, dtype, device),
        "",
        f"All of it took {(time.monotonic() - began) / 60:.1f} minutes.",
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(table)


if __name__ == "__main__":
    main()
