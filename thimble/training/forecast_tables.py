"""A forecast on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from thimble.config.describe import as_override
from thimble.console import log
from thimble.training.forecast import hours_here

LAUNCH_BOUND = 0.005  # seconds; some hundred kernels of a step take about that to be launched

if TYPE_CHECKING:
    from rich.console import Console

    from thimble.training.forecast import Forecast, Stages
    from thimble.training.plan import Plan


def render(result: Forecast, console: Console) -> None:
    plan, here = result.plan, result.here
    console.print(
        _table(
            [plan.recipe, ""],
            [
                ["parameters", f"{plan.parameters:,}"],
                ["steps", f"{plan.steps:,} of {plan.tokens_per_step:,} tokens"],
                ["tokens", f"{plan.tokens:,}; the data have {plan.tokens_available:,}"],
                ["epochs", f"{plan.epochs:.2f}"],
                ["tokens per parameter", f"{plan.tokens_per_parameter:.1f}"],
                ["FLOPs", f"{plan.flops:.3g}; {plan.flops_per_token:.3g} per token"],
                *_teacher(plan),
            ],
        )
    )
    parts = result.memory.to_dict()
    rows = [[name, _bytes(size)] for name, size in parts.items() if size or name == "total"]
    if "peak_measured" in here:
        measured = here["peak_measured"]
        rows.append(["measured", f"{_bytes(measured)} ({parts['total'] / measured - 1:+.1%})"])
    console.print(_table(["peak memory", here["precision"]], rows))
    places = [
        [
            here["device"],
            _bytes(here["memory_available"]),
            _fit(here),
            _hours(hours_here(result)),
            f"measured: {here['tokens_per_second']:,.0f} tokens/s" if "hours" in here else "",
        ]
    ]
    places += [
        [
            gpu["gpu"],
            f"{gpu['memory_gib']} GiB",
            _fit(gpu),
            _hours(gpu["hours"]) if gpu["fits"] else "",
            _range(*map(_dollars, gpu["dollars"])) if gpu["fits"] else "",
        ]
        for gpu in result.gpus
    ]
    console.print(_table(["machine", "memory", "micro-batch x passes", "time", "cost"], places))
    _notes([result], console)
    if result.proposal:
        words = " ".join(f"{key}={as_override(value)}" for key, value in result.proposal.items())
        console.print(Text(f"What fits here: {words}", "bold"))
    for warning in result.warnings:
        log.warning("%s", warning)


def _teacher(plan: Plan) -> list[list[str]]:
    found, rows = plan.teacher, []
    if found is None:
        return []
    if found.parameters and found.flops_per_token:
        share = found.flops_per_token / plan.flops_per_token
        rows.append(["teacher", f"{found.parameters:,} parameters, {share:.0%} of the FLOPs"])
    if found.cache_bytes:
        each = found.cache_bytes_per_token
        rows.append(
            [
                "teacher's cache",
                f"{_bytes(found.cache_bytes)} on disk, {each:,} bytes a token, "
                f"{_bytes(each * plan.tokens_per_step)} a step",
            ]
        )
    return rows


def render_stages(result: Stages, console: Console) -> None:
    """The table of run times of several stages and of all of them."""
    first, total = result.stages[0], result.sum
    names = [gpu["gpu"] for gpu in first.gpus]
    rows, before = [], ""
    for stage in result.stages:
        plan = stage.plan
        begins = f"the weights of {before}" if before else "random weights"
        before = plan.recipe
        times = [gpu["hours"] if gpu["fits"] else None for gpu in stage.gpus]
        epochs = f"{plan.examples:,} x {plan.epochs:.2g}"
        here = _hours(hours_here(stage))
        rows.append([plan.recipe, epochs, begins, here, *(map(_hours, times))])
    sums = [
        _hours(gpu["hours"]) if all(s.gpus[index]["fits"] for s in result.stages) else "-"
        for index, gpu in enumerate(total["gpus"])
    ]
    rows.append(["all", f"{total['examples']:,}", "", _hours(total["here"]), *sums])
    columns = ["stage", "examples x epochs", "begins with", f"here, {first.here['device']}"]
    console.print(_table([*columns, *(f"one {name}" for name in names)], rows))
    dollars = [f"{gpu['gpu']} {_range(*map(_dollars, gpu['dollars']))}" for gpu in total["gpus"]]
    console.print(Text(f"Cost of all: {', '.join(dollars)}.", "dim"))
    _notes(result.stages, console)
    for warning in dict.fromkeys(line for stage in result.stages for line in stage.warnings):
        log.warning("%s", warning)


def _notes(results: list[Forecast], console: Console) -> None:
    words = (
        "The times of GPUs are a range over the published utilizations of small models, not "
        f"measured; prices of {results[0].prices_of}."
    )
    halting = min(result.plan.halting_at_once for result in results)
    if halting < 1:
        words += (
            f" The shorter times are those of every example halting at once, {halting:.3g} of the "
            "longer ones'."
        )
    if any(
        3600 * gpu["hours"][1] / result.plan.steps < LAUNCH_BOUND
        for result in results
        for gpu in result.gpus
    ):
        words += (
            " Steps that short are bound by launching kernels, not by computing: a model this "
            "narrow takes longer there."
        )
    console.print(Text(words, "dim"))


def _fit(place: dict[str, Any]) -> str:
    if not place["fits"]:
        return "does not fit"
    words = f"{place['micro_batch_size']} x {place['gradient_accumulation_steps']}"
    return words + (", activations again" if place["checkpoint_activations"] else "")


def _hours(times: list[float] | None) -> str:
    return "not measured" if times is None else _range(*map(_time, times))


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"
    if hours >= 1 / 30:
        return f"{60 * hours:.0f} min"
    return f"{3600 * hours:.0f} s" if hours >= 1 / 3600 else "under 1 s"


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _dollars(value: float) -> str:
    return f"${value:,.2f}" if value >= 0.01 else "under $0.01"


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _table(head: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in head:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
