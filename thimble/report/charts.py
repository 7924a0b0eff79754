"""The plots of a run, each as SVG for the page and as PNG for everything else."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

INK, MODEL, OTHER, BAD, MENDED = "#3d4451", "#1f6feb", "#8b949e", "#cf222e", "#9a6700"
SIZE = (6.4, 2.9)  # inches; two beside each other on a wide screen
STYLE: Any = {
    "font.size": 9.0,
    "axes.edgecolor": OTHER,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "svg.fonttype": "path",
    "svg.hashsalt": "thimble",  # the same run gives the same bytes
}


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    svg: str
    png: bytes


def finish(name: str, title: str, figure: Figure) -> Chart:
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=144, metadata={"Software": None})
    picture = svg.getvalue()
    return Chart(name, title, picture[picture.index("<svg") :], png.getvalue())


def curve_charts(
    training: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
    rungs: dict[str, float],
) -> Iterator[Chart]:
    """Everything a run records over its steps, with guards and resumptions marked."""
    wanted = [
        ("loss", "Loss (nats per token)", [("loss", "training"), ("val_loss", "held out")], 1.0),
        ("perplexity", "Held-out perplexity", [("val_perplexity", "")], 1.0),
        ("bits_per_byte", "Held-out bits per byte", [("val_bits_per_byte", "")], 1.0),
        ("learning_rate", "Learning rate", [("learning_rate", "")], 1.0),
        ("grad_norm", "Gradient norm before clipping", [("grad_norm", "")], 1.0),
        ("throughput", "Tokens per second", [("tokens_per_second", "")], 1.0),
        ("memory", "Peak memory (GiB)", [("memory_bytes", "")], 2**-30),
    ]
    for name, title, series, scale in wanted:
        figure, axes = _axes()
        drawn = 0
        for key, label in series:
            points = [
                (record["step"], record[key] * scale)
                for record in [*training, *evaluations]
                if isinstance(record.get(key), int | float) and math.isfinite(record[key])
            ]
            if points:
                x, y = zip(*sorted(points), strict=True)
                colour = MODEL if len(series) == 1 or label == "held out" else OTHER
                mark = "o" if key.startswith("val_") else None
                axes.plot(x, y, color=colour, marker=mark, markersize=3, linewidth=1.3, label=label)
                drawn += 1
        if not drawn:
            continue
        if name in ("perplexity", "grad_norm"):
            axes.set_yscale("log")
        if name in ("throughput", "memory"):
            axes.set_ylim(bottom=0)
        if name == "bits_per_byte":
            _rungs(axes, rungs)
        _events(axes, events)
        if drawn > 1:
            axes.legend(frameon=False)
        axes.set_xlabel("step")
        yield finish(name, title, figure)


def ladder_chart(rungs: dict[str, float], model: str, bits: float) -> Chart:
    """The baselines and the model in bits per byte, worst first; shorter is better."""
    rows = sorted([*rungs.items(), (model, bits)], key=lambda row: row[1])
    figure, axes = _axes()
    colours = [MODEL if name == model else OTHER for name, _ in rows]
    bars = axes.barh([name for name, _ in rows], [value for _, value in rows], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3, color=INK)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bits per byte, less is better")
    return finish("ladder", "Against the baselines", figure)


def _axes() -> tuple[Figure, Any]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        return figure, figure.subplots()


def _rungs(axes: Any, rungs: dict[str, float]) -> None:
    low, high = axes.get_ylim()
    for name, value in rungs.items():
        if value <= high * 1.05:
            axes.axhline(value, color=OTHER, linewidth=0.8, linestyle=":")
            axes.annotate(
                name,
                (1, value),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=7,
                color=OTHER,
            )
            low = min(low, value * 0.97)
    axes.set_ylim(low, high)


def _events(axes: Any, events: Sequence[dict[str, Any]]) -> None:
    for event in events:
        if event["event"] in ("guard", "resumed"):
            stopped = event["event"] == "guard"
            axes.axvline(
                event["step"], color=BAD if stopped else MENDED, linewidth=1, linestyle="--"
            )
            axes.annotate(
                event["kind"] if stopped else "resumed",
                (event["step"], 1),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="right" if stopped else "left",
                va="top",
                fontsize=7,
                color=BAD if stopped else MENDED,
            )
