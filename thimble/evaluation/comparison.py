"""The table of a recursive model beside plain ones, and who is better."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble import artifacts

if TYPE_CHECKING:
    from rich.console import Console

LEDGER = "comparison.json"
RECURSIVE = "recursive"
COMPUTATION, PARAMETERS = "plain, same computation", "plain, same parameters"
BOTH = "plain, same computation and parameters"


@dataclass(frozen=True)
class Contestant:
    """A trained model and its figures on the held-out split.

    ``flops``: of the whole training, forward and backward; ``tokens_per_second`` counts a token at
    each of its supervision steps; ``layers`` are blocks that have weights of their own.
    """

    name: str
    run: Path
    layers: int
    parameters: int
    updates: int
    epochs: float
    flops: float
    minutes: float
    tokens_per_second: float
    nll: float
    bits_per_byte: float | None
    perplexity: float | None
    token_accuracy: float
    exact_accuracy: float | None  # of text nobody is asked


@dataclass(frozen=True)
class Comparison:
    """``waiting``: those that are not trained yet. ``verdict``: who is better, in sentences."""

    run: Path
    recipe: str
    kind: str
    split: str
    examples: int
    rows: list[Contestant]
    waiting: list[str]
    verdict: list[str]
    notes: list[str]
    created: str

    def to_dict(self) -> dict[str, Any]:
        return artifacts.plain(dataclasses.asdict(self))

    def render(self, console: Console) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        facts = f"{self.examples:,} {self.kind} of the {self.split} split"
        console.print(Text(f"{self.run}: {facts}"))
        head, rows = table(self.to_dict())
        made = Table(box=SIMPLE_HEAD, pad_edge=False)
        for number, heading in enumerate(head):
            made.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in rows:
            made.add_row(*map(Text, row))
        console.print(made)
        for line in self.verdict:
            console.print(Text(line, "bold"))
        for note in self.notes:
            console.print(Text(note, "dim"))


def verdict(rows: list[Contestant], kind: str) -> list[str]:
    """A sentence for each plain model: whether recursion beats it, and by what figures."""
    if kind == "puzzles":
        key, unit, sign = "exact_accuracy", "of the puzzles exact", 1
    else:
        key, unit, sign = "nll", "nats a token", -1
    lines = []
    for other in rows[1:]:
        mine, its = getattr(rows[0], key), getattr(other, key)
        outcome = (
            "is even with" if mine == its else ("beats" if sign * (mine - its) > 0 else "loses to")
        )
        figures = [f"{value:.1%}" if kind == "puzzles" else f"{value:.4f}" for value in (mine, its)]
        what = other.name.removeprefix("plain, ")
        lines.append(
            f"Recursion {outcome} the plain model of the {what}: {figures[0]} against "
            f"{figures[1]} {unit}."
        )
    return lines


def table(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows; ``comparison`` is its ``to_dict()``."""
    puzzles, text_alone = (comparison["kind"] == kind for kind in ("puzzles", "tokens"))
    head = ["model", "blocks", "parameters", "updates", "epochs", "FLOPs", "minutes", "tokens/s"]
    head += ["nats/token", *([] if puzzles else ["bits/byte", "perplexity"])]
    head += ["token accuracy", *([] if text_alone else ["exact"])]
    rows = []
    for row in comparison["rows"]:
        text = [] if puzzles else [_number(row["bits_per_byte"], ".3f")]
        text += [] if puzzles else [_number(row["perplexity"], ",.2f")]
        rows.append(
            [
                row["name"],
                f"{row['layers']:,}",
                f"{row['parameters']:,}",
                f"{row['updates']:,}",
                f"{row['epochs']:.1f}",
                f"{row['flops']:.2e}",
                f"{row['minutes']:.1f}",
                f"{row['tokens_per_second']:,.0f}",
                _number(row["nll"], ".4f"),
                *text,
                f"{row['token_accuracy']:.1%}",
                *([] if text_alone else [f"{row['exact_accuracy']:.1%}"]),
            ]
        )
    return head, rows


def _number(value: float | None, kind: str) -> str:
    return "none" if value is None else format(value, kind)
