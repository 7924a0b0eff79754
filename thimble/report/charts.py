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
from matplotlib.ticker import MaxNLocator

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


# Name, title, the keys of the records with their labels, and what they are multiplied by.
Curve = tuple[str, str, list[tuple[str, str]], float]

LOSS: list[Curve] = [
    ("loss", "Loss (nats per token)", [("loss", "training"), ("val_loss", "held out")], 1.0),
]
EVERY_RUN: list[Curve] = [
    ("perplexity", "Held-out perplexity", [("val_perplexity", "")], 1.0),
    ("bits_per_byte", "Held-out bits per byte", [("val_bits_per_byte", "")], 1.0),
    ("learning_rate", "Learning rate", [("learning_rate", "")], 1.0),
    ("grad_norm", "Gradient norm before clipping", [("grad_norm", "")], 1.0),
    ("throughput", "Tokens per second", [("tokens_per_second", "")], 1.0),
    ("memory", "Peak memory (GiB)", [("memory_bytes", "")], 2**-30),
]
SHARES = ("accuracy", "exact_accuracy", "q_halt_accuracy", "teacher_agreement")


def recursive_curves(per_sequence: bool) -> list[Curve]:
    """What a recursive run records, by the documents' names: of training as the examples come
    (the loss at all supervision steps, the rest where they halt), held out after the last step."""
    loss = "val_lm_loss" if per_sequence else "val_loss"

    def both(key: str, held_out: str) -> list[tuple[str, str]]:
        return [(key, "training"), (held_out, "held out")]

    return [
        ("lm_loss", "lm_loss (nats per token)", both("lm_loss", loss), 1.0),
        ("accuracy", "accuracy", both("accuracy", "val_accuracy"), 1.0),
        ("exact_accuracy", "exact_accuracy", both("exact_accuracy", "val_exact_accuracy"), 1.0),
        (
            "q_halt_accuracy",
            "q_halt_accuracy: the halting head is right",
            both("q_halt_accuracy", "val_q_halt_accuracy"),
            1.0,
        ),
        ("steps", "steps until it halts", both("steps", "val_halting_steps"), 1.0),
        ("loss", "Loss with the halting's (nats)", [("loss", "")], 1.0),
    ]


def curve_charts(
    training: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
    rungs: dict[str, float],
    first: Sequence[Curve] = LOSS,
) -> Iterator[Chart]:
    """What a run records over its steps, ``first`` and of every run, with guards and resumptions
    marked."""
    for name, title, series, scale in [*first, *EVERY_RUN]:
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
        if name in ("throughput", "memory", "steps", "calibration_error", "mix"):
            axes.set_ylim(bottom=0)
        if name in SHARES:
            axes.set_ylim(0, 1.02)
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


def step_charts(by_step: Sequence[dict[str, Any]], split: str) -> Iterator[Chart]:
    """The figures of a recursive model after each of its supervision steps."""
    accuracies = [("accuracy", "accuracy", OTHER), ("exact_accuracy", "exact", MODEL)]
    wanted = [
        ("nll_by_step", "nats per token", [("nll", "", MODEL)]),
        ("accuracy_by_step", "accuracy", accuracies),
    ]
    steps = [row["step"] for row in by_step]
    for name, title, series in wanted:
        figure, axes = _axes()
        for key, label, colour in series:
            axes.plot(steps, [row[key] for row in by_step], "o-", color=colour, label=label)
        if len(series) > 1:
            axes.set_ylim(0, 1.02)
            axes.legend(frameon=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("supervision step")
        yield finish(name, f"By supervision step, {split} split: {title}", figure)


def halting_chart(histogram: Sequence[int], split: str) -> Chart:
    """After which supervision step the halting head would stop how many examples."""
    figure, axes = _axes()
    bars = axes.bar(range(1, len(histogram) + 1), histogram, color=MODEL)
    axes.bar_label(bars, color=INK, fontsize=7)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("supervision step")
    return finish("halting", f"Examples that would halt there, {split} split", figure)


def comparison_chart(
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, exact: bool
) -> Chart:
    """Recursive and plain models over the computation their training took.

    ``curves``: of each its name and pairs of FLOPs and a held-out figure, the share of exact
    answers or nats a token.
    """
    figure, axes = _axes()
    for (name, points), colour in zip(curves, (MODEL, MENDED, OTHER), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=colour, markersize=3, linewidth=1.3, label=name)
    axes.legend(frameon=False)
    axes.set_xlabel("training FLOPs")
    title = "Held-out exact answers" if exact else "Held-out nats per token"
    return finish("comparison", f"{title} against computation", figure)


def axes(columns: int) -> tuple[Figure, Any]:
    """A figure with so many axes beside each other, as an array [columns]."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        return figure, figure.subplots(1, columns, squeeze=False)[0]


def _axes() -> tuple[Figure, Any]:
    figure, (one,) = axes(1)
    return figure, one


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


def _named(event: dict[str, Any]) -> str:
    if event["event"] == "objective":
        return f"from {event['from']} to {event['to']}"
    return str(event["event"]).replace("_", " ")


def _events(axes: Any, events: Sequence[dict[str, Any]]) -> None:
    for event in events:
        if event["event"] in ("guard", "resumed", "objective", "saddle", "saddle_left"):
            stopped = event["event"] == "guard"
            axes.axvline(
                event["step"], color=BAD if stopped else MENDED, linewidth=1, linestyle="--"
            )
            axes.annotate(
                event["kind"] if stopped else _named(event),
                (event["step"], 1),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="right" if stopped else "left",
                va="top",
                fontsize=7,
                color=BAD if stopped else MENDED,
            )
