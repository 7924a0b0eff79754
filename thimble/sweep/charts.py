"""The plots of a sweep: what each swept key does to what runs are compared by, and all curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from thimble import artifacts
from thimble.config.describe import as_override
from thimble.report.charts import BAD, INK, MODEL, OTHER, STYLE, finish
from thimble.sweep import ledger
from thimble.sweep.result import score, short, shown
from thimble.training.run import RunFolder

PANEL = (4.0, 3.2)  # inches
NAMED, TICKS = 8, 6  # so many lines get a legend, so many values their own tick


def draw(folder: Path) -> list[Path]:
    """Write ``sweep.png`` and ``curves.png`` into a sweep; none while no run has finished."""
    account = ledger.read(folder)
    finished = [run for run in account["runs"] if math.isfinite(score(run))]
    if not finished:
        return []
    keys = [key for key in account["swept"] if key != "seed"] or ["seed"]
    figures = {
        "sweep": panels(account["runs"], keys, account["swept"]),
        "curves": curves(finished),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with artifacts.atomic_file(paths[-1]) as temporary:
            temporary.write_bytes(finish(name, name, figure).png)
    return paths


def panels(runs: list[dict[str, Any]], keys: list[str], swept: dict[str, list[str]]) -> Figure:
    """One panel a key: its value against the score, a line for each setting of the others.

    Over several seeds a point is the mean and its bar the standard deviation. A cross at the top
    marks a value with which a run did not finish.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * len(keys), PANEL[1]), layout="constrained")
        rows = figure.subplots(1, len(keys), sharey=True, squeeze=False)
    for axes, key in zip(rows[0], keys, strict=True):
        place, names = positions(runs, key)
        groups = list(lines(runs, key))
        several = len(groups) > 1 and any(len(line) > 1 for _, line in groups)
        for label, line in groups:
            points: dict[float, list[float]] = {}
            for run in line:
                points.setdefault(place[as_override(run["overrides"][key])], []).append(score(run))
            x = sorted(points)
            y = [statistics.mean(points[at]) for at in x]
            bars = [statistics.stdev(points[at]) if len(points[at]) > 1 else 0.0 for at in x]
            axes.errorbar(
                x,
                y,
                bars if any(bars) else None,
                marker="o",
                markersize=4,
                linewidth=1.2,
                capsize=3,
                color=None if several else MODEL,
                label=label,
            )
        for run in runs:
            if run["status"] in ("stopped", "failed"):
                at = place[as_override(run["overrides"][key])]
                axes.plot(at, 0.98, "x", color=BAD, transform=axes.get_xaxis_transform())
        spots = sorted(set(place.values()))
        if not names and spots[0] > 0 and spots[-1] >= 10 * spots[0]:
            axes.set_xscale("log")
            axes.minorticks_off()
        if len(spots) <= min(TICKS, len(swept[key])):  # not of an interval
            words = sorted(place, key=place.__getitem__)
            axes.set_xticks(spots, words if names else [shown(at) for at in spots])
        axes.set_xlabel(short(key, swept))
        if several and len(groups) <= NAMED:
            axes.legend(frameon=False, fontsize=7)
    rows[0][0].set_ylabel(f"held-out {ledger.unit(runs)}")
    return figure


def positions(runs: list[dict[str, Any]], key: str) -> tuple[dict[str, float], bool]:
    """Where on the axis each value of a key stands, and whether the values are names."""
    values = {as_override(run["overrides"][key]): run["overrides"][key] for run in runs}
    names = any(isinstance(v, bool) or not isinstance(v, int | float) for v in values.values())
    numbers = range(len(values)) if names else values.values()
    return {word: float(at) for word, at in zip(values, numbers, strict=True)}, names


def lines(runs: list[dict[str, Any]], key: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The finished runs that differ in ``key`` and seed alone, with what they have in common."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if math.isfinite(score(run)):
            groups.setdefault(label(run, without=(key, "seed")), []).append(run)
    yield from groups.items()


def label(run: dict[str, Any], without: tuple[str, ...] = ()) -> str:
    values = run["overrides"]
    return ", ".join(
        f"{short(key, values)}={shown(value)}"
        for key, value in values.items()
        if key not in without
    )


def curves(runs: list[dict[str, Any]]) -> Figure:
    """The held-out score over the tokens seen, of every finished run; the best one in front."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
    ranked = sorted(runs, key=score)
    shades = matplotlib.colormaps["viridis"].resampled(max(len(ranked), 2))
    for rank, run in reversed(list(enumerate(ranked))):
        per_step = run["tokens"] / run["steps"]
        points = [
            (record["step"] * per_step, ledger.measure(record))
            for record in RunFolder(run["run"]).records()
            if math.isfinite(ledger.measure(record))
        ]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3,
                  linewidth=2.0 if rank == 0 else 1.0, color=MODEL if rank == 0 else shades(rank),
                  label=label(run) if rank < NAMED else None)  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=7)
    axes.set_xlabel("tokens seen", color=INK)
    axes.set_ylabel(f"held-out {ledger.unit(runs)}")
    axes.grid(color=OTHER, alpha=0.2)
    return figure
