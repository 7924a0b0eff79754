"""``students.md``: the tables and curves of ``students.json``, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from thimble.report import charts

Rows = list[dict[str, Any]]
# A loss that the first contestant comes to after this share of its steps.
SHARES = (0.25, 0.5, 0.75, 1.0)


def write_page(results: Mapping[str, Any], folder: Path) -> None:
    """``students.md`` and ``students-<part>.png`` into ``folder``."""
    text = [
        "# Students on two cores",
        "What is claimed of a student, held against the same student without it. Each part says "
        "the command it was printed by; `python benchmarks/students.py document` makes this page "
        "again from `students.json`. Figures are means over seeds, and in brackets the lowest and "
        "the highest.",
    ]
    for name, section in SECTIONS.items():
        if (part := results.get(name)) and part["rows"]:
            text += [*section(part, folder), *made(part)]
    (folder / "students.md").write_text("\n\n".join(text) + "\n")


def made(part: dict[str, Any]) -> list[str]:
    minutes = sum(row["minutes"] for row in part["rows"])
    kept = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    return [
        f"`{part['command']}`, {part['date']}, {part['machine']}, {kept}; load {part['load']:.1f} "
        f"when it began. {minutes:.0f} minutes of training students in all. The teacher: "
        f"`{part['teacher']}`."
    ]


def distilled(part: dict[str, Any], folder: Path) -> list[str]:
    teacher, groups = part["of_teacher"], by_arm(part["rows"])
    apart = part.get("told_apart", 4096)  # figures without it told all of the vocabulary apart
    rows = [[name, *learned(group), *likeness(group)] for name, group in groups.items()]
    own = [{**teacher, "minutes": 0.0}]
    rows.append(["the teacher", "", "", *likeness(own)])
    with_, without = (groups.get(name) for name in ("distilled", "without a teacher"))
    lines = []
    if with_ and without:
        lines = [
            told("bits per byte", "bits_per_byte", with_, without, -1, "With the teacher"),
            told("agreement", "agreement", with_, without, 1, "With the teacher"),
        ]
    return [
        "## Distilled, and without a teacher",
        f"The recipe `distill_nano` ({terms(part)}), {part['steps']:,} updates each, the same "
        "data in the same order, the same learning rate; without a teacher the loss is the "
        f"next token's alone. {measured_on(part)}. Agreement: how often both "
        f"think the same token likeliest; KL: from the teacher, in nats, its {apart:,} "
        "likeliest tokens told apart; calibration error: of the likeliest token's probability.",
        table(["", *LEARNED, *LIKENESS], rows),
        *lines,
    ]


def recursive(part: dict[str, Any], folder: Path) -> list[str]:
    groups = by_arm(part["rows"])
    rows = []
    for name, group in groups.items():
        first = group[0]
        shape = [str(first["layers"]), f"{first['parameters']:,}", f"{first['flops']:.2e}"]
        rows.append([name, *shape, *learned(group), *likeness(group)])
    mine = groups.get("recursive", [])
    lines = [
        told(
            "bits per byte",
            "bits_per_byte",
            mine,
            group,
            -1,
            f"Against the {name.removeprefix('plain, ')}",
        )
        for name, group in groups.items()
        if name != "recursive"
    ]
    return [
        "## Recursion over retention",
        f"`retnet_hrm` as the student of `distill_nano` ({terms(part)}), {part['steps']:,} "
        "updates, beside retention whose blocks run once, trained alike: as many blocks as make "
        f"the same computation, and as make the same number of parameters. {measured_on(part)}; "
        f"KL tells the teacher's {part['told_apart']:,} likeliest tokens apart, so it is compared "
        "within this table alone.",
        table(["", "blocks", "parameters", "FLOPs", *LEARNED, *LIKENESS], rows),
        *lines,
    ]


def teacher_start(part: dict[str, Any], folder: Path) -> list[str]:
    groups = by_arm(part["rows"])
    first = part["first"]
    rows = [
        [name, f"{first[name.partition(', ')[2]]:.2f}", ends(group)]
        for name, group in groups.items()
    ]
    tables = [
        steps_to(groups, (f"{way}, drawn weights", f"{way}, the teacher's weights"))
        for way in ("distilled", "next token")
    ]
    return [
        "## Beginning with the teacher's weights",
        f"`training.init_from_teacher=true` against drawn weights, {part['steps']:,} updates each. "
        "Held-out nats a token before the first update (seed 1) and after the last:",
        table(["", "before", "after"], rows),
        "Updates to a given held-out loss, the losses being those which drawn weights come to "
        "after a quarter, half, three quarters and all of their updates:",
        *[each for each in tables if each],
        picture(groups, folder, "teacher_start"),
    ]


def finetuned(part: dict[str, Any], folder: Path) -> list[str]:
    groups, tuned, kinds = by_arm(part["rows"]), part["finetuning"], part["kinds"]
    options = tuned["options"]
    fell = 1 - tuned["perplexity"] / tuned["base_perplexity"]
    names = ("teacher as it was", "fine-tuned teacher", "without a teacher")
    rows = [[name, ends(group)] for name, group in groups.items()]
    return [
        "## A teacher fine-tuned on the student's data",
        "The original quickstart promises 4.5 times faster convergence. Here the teacher, "
        f"`slm_nano`, learned `{kinds['known']}` in {part['teacher_minutes']:.1f} minutes; the "
        f"students are for `{kinds['new']}` ({kinds['train']:,} tokens of the same "
        "tokenizer). `thimble teacher finetune` "
        f"(learning rate {options['learning_rate']:g}, {options['batch_rows']} rows an "
        f"update) took {tuned['steps']:,} updates, {tuned['seconds'] / 60:.1f} minutes, and "
        f"brought its perplexity there from {tuned['base_perplexity']:.1f} to "
        f"{tuned['perplexity']:.1f} ({fell:.0%} lower). Then the same student learned "
        f"{part['steps']:,} updates from each, and from none. Held-out nats a token at the end:",
        table(["", "after"], rows),
        "Updates to a given held-out loss, the losses being those which the student of the "
        "teacher as it was comes to after a quarter, half, three quarters and all of its updates; "
        "and how many times fewer than that student's:",
        steps_to(groups, names),
        picture(groups, folder, "finetuned"),
    ]


SECTIONS: dict[str, Callable[[dict[str, Any], Path], list[str]]] = {
    "distilled": distilled,
    "teacher_start": teacher_start,
    "finetuned": finetuned,
    "recursive": recursive,
}


# ---------------------------------------------------------------------------------------- figures

LEARNED = ["seeds", "minutes"]
LIKENESS = ["bits/byte", "agreement", "KL", "calibration error"]


def learned(group: Rows) -> list[str]:
    return [str(len(group)), f"{statistics.mean(row['minutes'] for row in group):.1f}"]


def likeness(group: Rows) -> list[str]:
    return [
        spread([row["bits_per_byte"] for row in group], ".4f"),
        spread([row["agreement"] for row in group], ".2%"),
        spread([row["kl"] for row in group], ".4f"),
        spread([row["calibration"] for row in group], ".4f"),
    ]


def ends(group: Rows) -> str:
    return spread([row["curve"][-1][1] for row in group], ".4f") if group else "not yet"


def terms(part: dict[str, Any]) -> str:
    found = part["objective"]
    said = ", ".join(part["overrides"])
    return (
        f"alpha {found['alpha']:g}, temperature {found['temperature']:g}, top-{found['topk']}, "
        f"learning rate {found['learning_rate']:g}{'; ' + said if said else ''}"
    )


def measured_on(part: dict[str, Any]) -> str:
    return f"Measured on {part['rows'][0]['tokens']:,} tokens of the test split"


def told(what: str, key: str, mine: Rows, other: Rows, sign: int, who: str) -> str:
    """Whether ``key`` is better with it, and for how many of the seeds that both have."""
    theirs = {row["seed"]: row[key] for row in other}
    gains = [sign * (row[key] - theirs[row["seed"]]) for row in mine if row["seed"] in theirs]
    if not gains:
        return ""
    mean, better = statistics.mean(gains), sum(gain > 0 for gain in gains)
    return (
        f"**{who} it is {'better' if mean > 0 else 'WORSE'} by {abs(mean):.4f} in {what}**, better "
        f"for {better} of {len(gains)} seeds."
    )


def by_arm(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return found


def spread(values: Sequence[float], kind: str) -> str:
    mean = format(statistics.mean(values), kind)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{kind}} to {max(values):{kind}})"


def mean_curve(group: Rows) -> list[tuple[float, float]]:
    """Step and mean loss where all of them were looked at."""
    curves = [dict(map(tuple, row["curve"])) for row in group]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(step, statistics.mean(curve[step] for curve in curves)) for step in shared]


def reaches(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """The step at which a curve first is at ``loss``, straight between two looks; None: never."""
    before: Sequence[float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return step
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def steps_to(groups: dict[str, Rows], names: Sequence[str]) -> str:
    """Steps of each contestant to the losses of the first, and how many times fewer they are."""
    there = [name for name in names if name in groups]
    if not there or there[0] != names[0]:
        return ""
    reference = mean_curve(groups[names[0]])
    last = reference[-1][0]
    rows = []
    for share in SHARES:
        step, loss = min(reference, key=lambda point: abs(point[0] - share * last))
        row = [f"{loss:.4f}"]
        for name in there:
            found = [reaches(run["curve"], loss) for run in groups[name]]
            own = reaches(mean_curve(groups[name]), loss)
            steps = [value for value in found if value is not None]
            text = "never" if own is None else f"{own:.0f}"
            if len(steps) > 1:
                text += f" ({min(steps):.0f} to {max(steps):.0f})"
            if len(steps) < len(found) and len(found) > 1:
                text += f", {len(steps)} of {len(found)} seeds"
            if name != names[0] and own is not None:
                text += f", {step / own:.2f} x"
            row.append(text)
        rows.append(row)
    return table(["held-out loss", *there], rows)


def picture(groups: dict[str, Rows], folder: Path, part: str) -> str:
    colours = (charts.MODEL, charts.BAD, charts.OTHER, charts.MENDED)
    with matplotlib.rc_context(charts.STYLE):
        figure = Figure(figsize=charts.SIZE, layout="constrained")
        axes = figure.subplots()
    for (name, group), colour in zip(groups.items(), colours, strict=False):
        for number, row in enumerate(group):
            x, y = zip(*row["curve"], strict=True)
            axes.plot(x, y, color=colour, linewidth=1.1, label=name if number == 0 else None)
    axes.legend(frameon=False)
    axes.set_xlabel("updates")
    axes.set_ylabel("held-out nats a token")
    drawn = charts.finish(part, part, figure)
    (folder / f"students-{part}.png").write_bytes(drawn.png)
    return f"![Held-out loss over updates, a line for each seed](students-{part}.png)"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
