"""The gate's result on a terminal: conditions as a table, baselines and model as one bar chart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from thimble.evaluation.acceptance import Acceptance, Rung

BAR = 40  # columns of the longest bar
WHOLE = "whole text"


def render(result: Acceptance, console: Console) -> None:
    verdict = (
        Text("accepted", "bold green") if result.accepted else Text("not accepted", "bold red")
    )
    console.print(Text(f"{result.checkpoint}: ").append_text(verdict))
    console.print(_conditions(result))
    if result.ladder:
        console.print(_bars(result))
        for line in ladder_words(result.ladder, result.evaluation["bits_per_byte"]):
            console.print(Text(line))
    for note in result.notes:
        console.print(Text(note, "dim"))


def _conditions(result: Acceptance) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "condition", "wanted", "measured"):
        table.add_column(heading, overflow="fold")
    marks = {True: Text("yes", "green"), False: Text("no", "red"), None: Text("?", "yellow")}
    for condition in result.conditions:
        cells = (condition.name, condition.wanted, condition.measured)
        table.add_row(marks[condition.ok], *map(Text, cells))
    return table


def _bars(result: Acceptance) -> Table:
    """Shorter is better; the model stands where its own bits per byte put it."""
    bits = result.evaluation["bits_per_byte"]
    rows = [(rung.name, rung.bits_per_byte) for rung in result.ladder]
    rows.insert(sum(value > bits for _, value in rows), (f"this model, {result.recipe}", bits))
    longest = max(value for _, value in rows)
    size, documents = result.evaluation["bytes"], result.evaluation["documents"]
    table = Table(
        box=None,
        pad_edge=False,
        title=f"bits per byte on {size:,} held-out bytes ({documents:,} documents)",
        title_justify="left",
    )
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        mine = name.startswith("this model")
        style = "bold cyan" if mine else "dim" if value > bits else ""
        bar = ("█" if mine else "▒") * max(round(BAR * value / longest), 1)
        table.add_row(Text(name, style), Text(bar, style), Text(f"{value:.3f}", style))
    return table


def ladder_words(ladder: list[Rung], bits: float) -> list[str]:
    """What the ladder says, in sentences: rungs passed, rungs not reached, and why."""
    passed = [rung for rung in ladder if rung.passed_by_model]
    ahead = [rung for rung in ladder if not rung.passed_by_model]
    lines = []
    if passed:
        best = passed[-1]
        less = 1 - bits / best.bits_per_byte
        lines.append(
            f"It passed {len(passed)} of {len(ladder)} baselines; it takes {less:.0%} fewer bits "
            f"than the best of them, {best.name}."
        )
    else:
        lines.append("It passed none of the baselines: it has learned less than counting does.")
    if ahead:
        named = ", ".join(f"{rung.name} ({rung.bits_per_byte:.3f})" for rung in ahead)
        lines.append(f"Not reached: {named}.")
    if any(rung.name.endswith(WHOLE) for rung in ahead):
        lines.append(
            "A compressor of the whole text looks back over all documents before, whose "
            "boilerplate recurs; this model sees no further than its window."
        )
    if any(rung.name.endswith("gram") for rung in ahead):
        lines.append(
            "An n-gram model counts the same training text the model learned from: it can be "
            "passed with more steps or a larger recipe."
        )
    return lines
