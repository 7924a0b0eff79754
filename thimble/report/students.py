"""What a report says of a student: how it came near its teacher, its saddles, what it remembers
over how far, and what a context costs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from thimble.report.charts import INK, MODEL, OTHER, Chart, Curve, axes, finish
from thimble.training.saddle import in_words

# Of a run with a teacher; nothing is drawn of what its records have not.
CURVES: list[Curve] = [
    ("kl", "Divergence from the teacher (nats, training at its temperature)",
     [("kl", "training"), ("val_teacher_kl", "held out")], 1.0),
    ("teacher_agreement", "Same likeliest token as the teacher",
     [("val_teacher_agreement", "")], 1.0),
    ("calibration_error", "Calibration error of the likeliest token",
     [("val_calibration_error", "")], 1.0),
    ("ce", "Cross-entropy in training (nats per token)", [("ce", "")], 1.0),
    ("mix", "Mix of the objective", [("alpha", "alpha"), ("temperature", "temperature")], 1.0),
]  # fmt: skip
COLOURS = {"student": MODEL, "teacher": OTHER}
SADDLES = ("saddle", "saddle_left", "saddle_stays")


def saddles(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each event of the saddle's watch, in words."""
    return [
        {"step": event["step"], "words": in_words(dict(event))}
        for event in events
        if event["event"] in SADDLES
    ]


def charts(evaluation: Mapping[str, Any] | None) -> Iterator[Chart]:
    """Of the best checkpoint's evaluation, where it has them: needles, and costs of a context."""
    found = evaluation or {}
    if found.get("needle"):
        yield from needle_charts(found["needle"])
    if found.get("context"):
        yield from context_charts(found["context"])


def needle_charts(needle: Mapping[str, Any]) -> Iterator[Chart]:
    """Depth against length, a map for each model: the answers that are right, the nats gained."""
    for key, title in (
        ("accuracy", "Needles found"),
        ("nats", "Nats gained by the needle"),
    ):
        models = {name: each for name, each in needle["models"].items() if each["cells"]}
        if not models:
            return
        top = max(cell[key] for each in models.values() for cell in each["cells"])
        top = 1.0 if key == "accuracy" else max(top, 0.1)
        figure, beside = axes(columns=len(models))
        for place, (name, each) in zip(beside, models.items(), strict=True):
            _map(place, needle["depths"], each["cells"], key, top)
            place.set_title(name, fontsize=9, color=INK)
        beside[0].set_ylabel("needle at")
        yield finish(f"needle_{key}", f"{title}, by depth and length of the context", figure)


def _map(
    place: Any, depths: Sequence[float], cells: Sequence[Mapping[str, Any]], key: str, top: float
) -> None:
    lengths = sorted({cell["length"] for cell in cells})
    values = {(cell["depth"], cell["length"]): cell[key] for cell in cells}
    grid = [[values[depth, length] for length in lengths] for depth in depths]
    place.imshow(grid, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    place.grid(visible=False)
    place.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
    place.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    place.set_xlabel("tokens")
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            said = f"{value:.0%}" if key == "accuracy" else f"{value:.1f}"
            colour = "white" if value > 0.6 * top else INK
            place.text(column, row, said, ha="center", va="center", color=colour, fontsize=7)


def context_charts(context: Mapping[str, Any]) -> Iterator[Chart]:
    """What is kept, and how fast it reads and writes, against what has been read."""
    for key, title, scale in (
        ("state_bytes", "Kept for the context (MiB, one sequence)", 2**-20),
        ("decode_tokens_per_second", "Tokens written per second, after the context", 1.0),
        ("prefill_tokens_per_second", "Tokens read per second", 1.0),
        ("peak_bytes", "Peak memory with the weights (GiB)", 2**-30),
    ):
        figure, (place,) = axes(columns=1)
        drawn = 0
        for name, each in context["models"].items():
            points = [(row["length"], row[key] * scale) for row in each["rows"] if row[key]]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            place.plot(x, y, "o-", color=COLOURS[name], markersize=3, linewidth=1.3, label=name)
            drawn += 1
        if not drawn:
            continue
        place.set_xscale("log", base=2)
        place.set_xticks(context["lengths"], [f"{length:,}" for length in context["lengths"]])
        if key == "state_bytes":
            place.set_yscale("log")
        else:
            place.set_ylim(bottom=0)
        place.set_xlabel("tokens read")
        place.legend(frameon=False)
        yield finish(f"context_{key}", title, figure)
