"""What a run takes: memory by part, hours and cost, here and on GPUs it might be rented.

Memory is simulated (``memory``), then held against real steps (``probe``), which also give the
speed of this machine. For other GPUs the data sheet and published utilizations give a range.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from thimble.config.schema import Config
from thimble.training import devices
from thimble.training.memory import Memory, peak_memory
from thimble.training.plan import Plan, plan
from thimble.training.probe import probe

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30
USABLE = 0.9  # of a device's memory: allocators need some room


@dataclass(frozen=True)
class Forecast:
    """``memory`` in bytes by part; ``here`` and each of ``gpus``: what fits, hours, cost."""

    plan: Plan
    memory: Memory
    here: dict[str, Any]
    gpus: list[dict[str, Any]]
    proposal: dict[str, Any]
    prices_of: str
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        own = asdict(self) | {"memory": self.memory.to_dict()}
        return {**self.plan.to_dict(), **{key: own[key] for key in own if key != "plan"}}

    def render(self, console: Console) -> None:
        from thimble.training.forecast_tables import render

        render(self, console)


@dataclass(frozen=True)
class Stages:
    """Runs one after the other, each beginning with the weights of the one before."""

    stages: list[Forecast]

    @property
    def sum(self) -> dict[str, Any]:
        """``examples`` and ``tokens``; ``here`` and for each of ``gpus`` hours (and dollars), from
        every example halting at once to none of them doing so. None where it is not known."""

        def added(ranges: list[list[float] | None]) -> list[float] | None:
            known = [each for each in ranges if each is not None]
            return [sum(ends) for ends in zip(*known, strict=True)] if known == ranges else None

        first = self.stages[0]
        return {
            "examples": sum(stage.plan.examples for stage in self.stages),
            "tokens": sum(stage.plan.tokens for stage in self.stages),
            "here": added([hours_here(stage) for stage in self.stages]),
            "gpus": [
                {
                    "gpu": gpu["gpu"],
                    "hours": added([stage.gpus[index]["hours"] for stage in self.stages]),
                    "dollars": added([stage.gpus[index]["dollars"] for stage in self.stages]),
                }
                for index, gpu in enumerate(first.gpus)
            ],
        }

    def to_dict(self) -> dict[str, Any]:
        return {"stages": [stage.to_dict() for stage in self.stages], "sum": self.sum}

    def render(self, console: Console) -> None:
        from thimble.training.forecast_tables import render_stages

        render_stages(self, console)


def hours_here(found: Forecast) -> list[float] | None:
    """Of this machine, as of ``gpus``; None when no real step was taken."""
    here = found.here
    return [here["hours_halting_at_once"], here["hours"]] if "hours" in here else None


def forecast(config: Config, *, measure: bool = True) -> Forecast:
    """The plan of a run with its memory, time and cost; ``measure``: also take real steps here.

    Raises DataError when the tokens are not there, and EnvironmentProblem when the device is not.
    """
    outline = plan(config)
    device = devices.resolve_device(config.device)
    dtype = devices.resolve_precision(config.precision, device)
    micro = config.training.micro_batch_size
    predicted = peak_memory(config, dtype, device.type)
    here: dict[str, Any] = {
        "device": devices.describe(device),
        "precision": str(dtype).removeprefix("torch."),
        "memory_available": devices.available_memory(device),
    }
    if measure:
        # Far apart, as what a process keeps beside its tensors varies by some per cent.
        smaller = {max(micro // 8, 1), max(micro // 2, 1)} if device.type != "cuda" else set()
        steps = probe(config, sorted({*smaller, micro}), outline.flops_per_token)
        predicted, measured = _settle(config, predicted, steps, dtype, device, outline)
        here |= measured
    memory_of = _affine(config, dtype, device.type, predicted)
    here |= _fitting(config, memory_of, here["memory_available"])
    warnings = [*outline.warnings]
    if predicted.total > USABLE * here["memory_available"]:
        warnings.append(
            f"A micro-batch of {micro} windows takes about {predicted.total / GIB:.1f} GiB, and "
            f"{here['device']} has {here['memory_available'] / GIB:.1f} GiB free."
        )
    if "problem" in here:
        warnings.append(f"Not all real steps could be taken: {here['problem']}.")
    table = _table()
    gpus = [_on(config, outline, name, gpu, table) for name, gpu in table["gpus"].items()]
    return Forecast(
        plan=replace(outline, warnings=[]),
        memory=predicted,
        here=here,
        gpus=gpus,
        proposal=_proposal(config, here),
        prices_of=str(table["date"]),
        warnings=warnings,
    )


def _proposal(config: Config, here: dict[str, Any]) -> dict[str, Any]:
    """The keys to change so that the run fits here; none when it does, or nothing would do."""
    training = config.training
    names = ("micro_batch_size", "gradient_accumulation_steps", "checkpoint_activations")
    return {
        f"training.{name}": here[name]
        for name in names
        if here["fits"] and here[name] != getattr(training, name)
    }


def _settle(
    config: Config,
    predicted: Memory,
    steps: list[dict[str, Any]],
    dtype: torch.dtype,
    device: torch.device,
    outline: Plan,
) -> tuple[Memory, dict[str, Any]]:
    """Add to the simulation what smaller real steps took beyond theirs; and what was measured."""
    done = [step for step in steps if "problem" not in step]
    measured: dict[str, Any] = {}
    if problem := [step["problem"] for step in steps if "problem" in step]:
        measured["problem"] = problem[0]
    if not done:
        return predicted, measured
    last, micro = done[-1], config.training.micro_batch_size
    pace = last["micro_batch_size"] * config.training.sequence_length / last["seconds"]
    measured |= {
        "tokens_per_second": pace,
        "hours": outline.tokens / pace / 3600,
        "hours_halting_at_once": outline.halting_at_once * outline.tokens / pace / 3600,
        "measured_with": last["micro_batch_size"],
    }
    if last["micro_batch_size"] == micro:
        measured["peak_measured"] = last["peak_bytes"]
    if device.type == "cuda":
        return predicted, measured
    # The process itself, and what its allocator keeps: linear in the micro-batch, as it turns out.
    smaller = [step for step in done if step["micro_batch_size"] < micro] or done
    beyond = [
        (n, step["peak_bytes"] - _one_pass(config, n, dtype, device).total)
        for step in smaller
        for n in [step["micro_batch_size"]]
    ]
    (first, a), (second, b) = beyond[0], beyond[-1]
    slope = (b - a) / (second - first) if second > first else 0.0
    other = max(int(b + slope * (micro - second)), 0)
    return replace(predicted, other=other), measured


def _one_pass(config: Config, micro: int, dtype: torch.dtype, device: torch.device) -> Memory:
    return peak_memory(_with(config, micro, 1), dtype, device.type)


def _with(config: Config, micro: int, accumulation: int, again: bool | None = None) -> Config:
    training = config.training.model_copy(
        update={
            "micro_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "checkpoint_activations": config.training.checkpoint_activations
            if again is None
            else again,
        }
    )
    return config.model_copy(update={"training": training})


def _affine(
    config: Config, dtype: torch.dtype, device_type: str, known: Memory | None = None
) -> Callable[[int, bool], float]:
    """Peak bytes by micro-batch size and whether activations are computed again."""
    lines: dict[bool, tuple[float, float]] = {}
    batch = config.training.micro_batch_size * config.training.gradient_accumulation_steps
    large = min(batch, 4)
    beside = known.other if known else 0  # less at smaller ones, by how much is not known

    def memory(micro: int, again: bool) -> float:
        if again not in lines:
            at = [
                peak_memory(_with(config, n, 2 if batch > 1 else 1, again), dtype, device_type)
                for n in (1, large)
            ]
            slope = (at[1].total - at[0].total) / max(large - 1, 1)
            lines[again] = (at[0].total - slope + beside, slope)
        start, slope = lines[again]
        return start + slope * micro

    return memory


def _fitting(
    config: Config, memory_of: Callable[[int, bool], float], available: float
) -> dict[str, Any]:
    """The largest micro-batch of the same global batch that fits, computing again only if needed.

    The configured one stays where it fits.
    """
    training = config.training
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    sizes = [n for n in range(training.micro_batch_size, 0, -1) if batch % n == 0]
    for again in (training.checkpoint_activations, True):
        for micro in sizes:
            if memory_of(micro, again) <= USABLE * available:
                return {
                    "fits": True,
                    "micro_batch_size": micro,
                    "gradient_accumulation_steps": batch // micro,
                    "checkpoint_activations": again,
                }
    return {"fits": False}


def _on(
    config: Config, outline: Plan, name: str, gpu: dict[str, Any], table: dict[str, Any]
) -> dict[str, Any]:
    """What a GPU of the table would need: what fits, hours and dollars from low to high."""
    batch = config.training.micro_batch_size * config.training.gradient_accumulation_steps
    whole = _with(config, batch, 1)  # a GPU is fastest with all of a step at once
    fit = _fitting(
        whole, _affine(whole, devices.PRECISIONS[gpu["precision"]], "cuda"), gpu["memory_gib"] * GIB
    )
    use = table["utilization"]
    slow, fast = (
        outline.flops / (gpu["tflops"] * 1e12 * use[end]) / 3600 for end in ("low", "high")
    )
    price, least = gpu["price"], outline.halting_at_once
    return {
        "gpu": name,
        "memory_gib": gpu["memory_gib"],
        **fit,
        "hours": [fast * least, slow],
        "dollars": [fast * least * price["low"], slow * price["high"]],
    }


def _table() -> dict[str, Any]:
    import yaml

    text = importlib.resources.files("thimble.training").joinpath("gpus.yaml").read_text("utf-8")
    return yaml.safe_load(text)
