"""What a sweep gave: its runs, best first, and the means over seeds."""

from __future__ import annotations

import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thimble.config.describe import as_override
from thimble.errors import GuardStop, ThimbleError
from thimble.sweep import ledger
from thimble.sweep.words import text
from thimble.training.panel import clock


@dataclass(frozen=True)
class Sweep:
    """``runs``: the entries of ``sweep.json``, finished ones by ``score``, then the others.

    ``seeds``: where ``seed`` was swept, mean and sample standard deviation over the finished runs
    of each other setting, best mean first.
    """

    folder: Path
    recipe: str
    swept: dict[str, list[str]]
    runs: list[dict[str, Any]]
    seeds: list[dict[str, Any]]
    plots: list[Path]

    @classmethod
    def of(cls, folder: Path, plots: list[Path]) -> Sweep:
        account = ledger.read(folder)
        runs = sorted(account["runs"], key=lambda run: (score(run), run["number"]))
        return cls(
            folder,
            account["recipe"],
            account["swept"],
            runs,
            over_seeds(runs) if "seed" in account["swept"] else [],
            plots,
        )

    @property
    def best(self) -> dict[str, Any] | None:
        """The finished run of the lowest score."""
        first = self.runs[0] if self.runs else None
        return first if first and math.isfinite(score(first)) else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "sweep": str(self.folder),
            "recipe": self.recipe,
            "swept": self.swept,
            "best": self.best,
            "runs": self.runs,
            "seeds": self.seeds,
            "plots": [str(plot) for plot in self.plots],
        }

    def render(self, console: Any) -> None:
        from rich.text import Text

        console.print(self.table())
        if self.seeds:
            console.print(self.seed_table())
        for run in self.runs:
            if "reason" in run:
                console.print(Text(f"run {run['number']} {run['status']}: {run['reason']}"))
        if best := self.best:
            found = f"{score(best):.4f} {ledger.unit(self.runs)}"
            console.print(f"best: {text(best['overrides'])}, {found}", soft_wrap=True)
            for verb in ("report", "train"):  # a run as a recipe is that run again
                console.print(f"  thimble {verb} {shlex.quote(best['run'])}", soft_wrap=True)
        for path in [self.folder / ledger.LEDGER, *self.plots]:
            console.print(str(path), soft_wrap=True)

    def table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("run", justify="right")
        for key in self.swept:
            table.add_column(short(key, self.swept), justify="right", overflow="fold")
        there = {key for run in self.runs for key in run}
        figures = {key: column for key, column in ledger.FIGURES.items() if key in there}
        for name in (*(name for name, _ in figures.values()), "steps", "time", "tok/s"):
            table.add_column(name, justify="right")
        table.add_column("", overflow="fold")
        for run in self.runs:
            values = [
                str(run["number"]),
                *(shown(run["overrides"].get(key)) for key in self.swept),
                *(number(run, key, form) for key, (_, form) in figures.items()),
                *(number(run, "steps", ","), clock(run["seconds"]) if "seconds" in run else ""),
                number(run, "tokens_per_second", ",.0f"),
                run["run"] if run["status"] == "finished" else run["status"],
            ]
            table.add_row(*map(Text, values))
        return table

    def seed_table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("over seeds", ledger.unit(self.runs), "sd", "runs"):
            table.add_column(name, justify="left" if name == "over seeds" else "right")
        for row in self.seeds:
            table.add_row(
                Text(text(row["overrides"]) or "all"),
                f"{row['mean']:.4f}",
                "" if row["sd"] is None else f"{row['sd']:.4f}",
                f"{row['finished']} of {row['runs']}",
            )
        return table


class SweepFailed(ThimbleError):
    """No run of a sweep finished. Its status is that of a guard when guards stopped all of them,
    otherwise that of the first failure."""

    def __init__(self, sweep: Sweep) -> None:
        ends = [f"  run {run['number']}: {run.get('reason', run['status'])}" for run in sweep.runs]
        super().__init__(
            f"None of the {len(sweep.runs)} runs finished; see {sweep.folder / ledger.LEDGER}.\n"
            + "\n".join(ends)
        )
        statuses = [run["exit_status"] for run in sweep.runs if "exit_status" in run]
        others = [status for status in statuses if status != GuardStop.status]
        self.status = (others or statuses or [1])[0]


def score(run: dict[str, Any]) -> float:
    """What runs are compared by, see ``ledger.measure``; infinite unless the run finished with a
    finite one."""
    return ledger.measure(run) if run["status"] == "finished" else math.inf


def over_seeds(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(text(without_seed(run)), []).append(run)
    rows = []
    for group in groups.values():
        values = [score(run) for run in group if math.isfinite(score(run))]
        if values:
            rows.append(
                {
                    "overrides": without_seed(group[0]),
                    "mean": statistics.mean(values),
                    "sd": statistics.stdev(values) if len(values) > 1 else None,
                    "finished": len(values),
                    "runs": len(group),
                }
            )
    return sorted(rows, key=lambda row: row["mean"])


def without_seed(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run["overrides"].items() if key != "seed"}


def short(key: str, keys: Any) -> str:
    """The last part of a key where that is clear."""
    tail = key.rpartition(".")[2]
    return tail if sum(other.rpartition(".")[2] == tail for other in keys) == 1 else key


def shown(value: Any) -> str:
    """A value in a table or a plot; of a drawn number four digits say enough."""
    return f"{value:.4g}" if isinstance(value, float) else as_override(value)


def number(run: dict[str, Any], key: str, form: str) -> str:
    return format(run[key], form) if key in run else ""
