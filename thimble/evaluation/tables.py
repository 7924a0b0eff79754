"""An evaluation on a terminal: figures by category, texts, benchmark, score; of a recursive model
figures by supervision step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from thimble.evaluation.evaluate import Evaluation, Selection
    from thimble.evaluation.evaluate_recursive import RecursiveEvaluation

Row = list[str]
Maker = Callable[[Mapping[str, Any]], tuple[Row, list[Row]]]
# As the recursive models' own programs print them, and in their order.
DOCUMENTED = "accuracy", "exact_accuracy", "lm_loss", "q_halt_accuracy", "q_halt_loss", "steps"

NEEDLE_FIGURES = {
    "accuracy": "needles found, by depth",
    "choice": "first word raised most",
    "nats": "nats gained",
}


def figures_rows(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Held-out text, all of it and by category: headings and rows."""
    figures = evaluation["figures"]
    head = ["held-out text", "documents", "tokens", "bits/byte", "perplexity", "top 1", "top 5"]
    parts = {"all": figures, **figures["by_category"]}
    return head, [
        [
            name,
            f"{part['documents']:,}",
            f"{part['tokens']:,}",
            _number(part["bits_per_byte"], ".3f"),
            _number(part["perplexity"], ",.2f"),
            f"{part['top1_accuracy']:.1%}",
            f"{part['top5_accuracy']:.1%}",
        ]
        for name, part in parts.items()
    ]


def student_rows(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Beside the teacher, and how far from as sure as it is right: of all text, by category."""
    figures = evaluation["figures"]
    head = ["beside the teacher", "KL, nats", "same likeliest", "calibration error"]
    if "calibration_error" not in figures:  # of an earlier version
        return head, []
    if evaluation["teacher"] is None:
        head = ["calibration", "error"]
        return head, [["likeliest token", f"{figures['calibration_error']:.1%}"]]
    head += ["teacher's bits/byte", "its perplexity"]
    parts = {"all": figures, **figures["by_category"]}
    return head, [
        [
            name,
            _number(part["teacher_kl"], ".4f"),
            f"{part['teacher_agreement']:.1%}",
            f"{part['calibration_error']:.1%}",
            _number(part.get("teacher_bits_per_byte"), ".3f"),
            _number(part.get("teacher_perplexity"), ",.2f"),
        ]
        for name, part in parts.items()
    ]


def needle_tables(evaluation: Mapping[str, Any]) -> list[tuple[Row, list[Row]]]:
    """Of each model what it makes of needles: a row for each length, a column for each depth."""
    needle = evaluation.get("needle")
    if not needle:
        return []
    made = []
    for name, found in needle["models"].items():
        for figure, title in NEEDLE_FIGURES.items():
            head = [f"{name}: {title}", *(f"{depth:.0%}" for depth in needle["depths"])]
            other = {"accuracy": "no needle", "choice": "by chance"}.get(figure)
            head += [other] if other else []
            rows = []
            for row in found["without"]:
                length = row["length"]
                cells = [cell[figure] for cell in found["cells"] if cell["length"] == length]
                if figure == "nats":
                    rows.append([f"{length:,} tokens", *(f"{value:+.2f}" for value in cells)])
                else:
                    shares = [*cells, row.get(figure, needle["chance"])]
                    rows.append([f"{length:,} tokens", *(f"{value:.0%}" for value in shares)])
            made.append((head, rows))
    return made


def context_tables(evaluation: Mapping[str, Any]) -> list[tuple[Row, list[Row]]]:
    """Speed and memory against the length of what was read."""
    context = evaluation.get("context")
    if not context:
        return []
    made = []
    for name, found in context["models"].items():
        head = [f"{name} after", "reading, tokens/s", "writing, tokens/s", "state", "peak"]
        rows = [
            [
                f"{row['length']:,} tokens" + " (more than made for)" * row["beyond"],
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{row['decode_tokens_per_second']:,.0f}",
                _bytes(row["state_bytes"]),
                _bytes(row["peak_bytes"]),
            ]
            for row in found["rows"]
        ]
        if not any(row["peak_bytes"] for row in found["rows"]):
            head, rows = head[:-1], [row[:-1] for row in rows]
        made.append((head, rows))
    return made


def text_rows(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Generated continuations beside the real ones."""
    names = {
        "tokens": "mean length, tokens",
        "degenerate": "degenerate",
        "distinct_pairs": "distinct pairs of tokens",
        "repeated_fours": "repeated runs of four",
        "known_words": "words of the training text",
        "on_topic": "takes up a word of the prompt",
    }
    rows = []
    for key, name in names.items():
        kind = ",.1f" if key == "tokens" else ".0%"
        pair = (evaluation["generated"][key], evaluation["real"][key])
        rows.append([name, *(_number(value, kind) for value in pair)])
    texts = evaluation["generated"]["texts"]
    return [f"{texts} continuations", "generated", "real"], rows


def benchmark_rows(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """The skills of the benchmark beside what needs no model; tasks of the harness below."""
    rows = []
    benchmark = evaluation["benchmark"]
    if benchmark:
        for name, part in {**benchmark["skills"], "all": benchmark}.items():
            rows.append(
                [
                    name,
                    f"{part['items']}",
                    _share(part),
                    _number(part["chance"], ".0%"),
                    _number(part["overlap"], ".0%"),
                ]
            )
    for name, part in (evaluation["tasks"] or {}).items():
        items = f"{part['items']}" if part["items"] else ""
        rows.append([f"{name} ({part['metric']})", items, _share(part), "", ""])
    return ["benchmark", "items", "accuracy", "chance", "word overlap"], rows


def speed_rows(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    pace = evaluation["speed"]
    return ["speed", pace["device"]], [
        ["generating", f"{pace['tokens_per_second']:,.0f} tokens/s"],
        ["first token", f"{pace['first_token_ms']:,.1f} ms, {pace['prompt_tokens']} read before"],
        ["each later token", f"{pace['token_ms']:,.1f} ms"],
        ["reading a full context", f"{pace['prompt_tokens_per_second']:,.0f} tokens/s"],
    ]


def score_rows(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    score = evaluation["score"]
    names = {
        "perplexity": "0.4 x 10 / perplexity",
        "os": "0.3 x benchmark",
        "mmlu": "0.2 x MMLU",
        "speed": "0.1 x speed / 50",
        "total": "score",
    }
    return ["weighted score", ""], [[names[key], f"{value:.4f}"] for key, value in score.items()]


def step_rows(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """A recursive model after each of its supervision steps, and where its halting head stops."""
    figures = evaluation["figures"]
    stops = figures["halting_histogram"]
    parts = [*figures["by_step"], figures["when_halting"]]
    names = [*(f"{part['step']}" for part in figures["by_step"]), "where it halts"]
    here = [*(f"{count:,}" for count in stops), f"mean {figures['halting_steps']:.2f}"]
    head = ["supervision step", "nats/token", "accuracy", "exact", "halting right", "halt here"]
    rows = [
        [
            name,
            _number(part["nll"], ".4f"),
            f"{part['accuracy']:.1%}",
            f"{part['exact_accuracy']:.1%}",
            f"{part['q_halt_accuracy']:.1%}",
            count,
        ]
        for name, part, count in zip(names, parts, here, strict=True)
    ]
    return head, rows


def baseline_rows(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Held-out answers beside what models make of them that only count."""
    figures, baselines = evaluation["figures"], evaluation["baselines"]
    head = ["held-out answers", "nats/token", "perplexity", "bits/byte"]
    if not baselines:
        return head, []
    rows = [
        [f"this model ({figures['form']})", figures["nll"], figures["bits_per_byte"]],
        *(
            [name, baselines[f"{name}_nll"], baselines.get(f"{name}_bits_per_byte")]
            for name in ("bigram", "unigram", "uniform")
        ),
    ]
    return head, [
        [name, _number(nll, ".4f"), _number(_exp(nll), ",.2f"), _number(bits, ".3f")]
        for name, nll, bits in rows
    ]


def vote_rows(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """ARC: two answers for each test input, by the votes of all augmentations."""
    found = evaluation["arc"] or {}
    return ["votes of all augmentations", ""], [
        [name.replace("_", " "), f"{value:.1%}" if "@" in name else f"{value:,}"]
        for name, value in found.items()
    ]


def tables(evaluation: Mapping[str, Any]) -> list[tuple[Row, list[Row]]]:
    """All tables of an evaluation, those that have rows; ``evaluation`` is its ``to_dict()``."""
    if "kind" in evaluation:  # of a recursive model
        found = [make(evaluation) for make in (step_rows, baseline_rows, vote_rows)]
        return [table for table in found if table[1]]
    first: tuple[Maker, ...] = (figures_rows, student_rows, text_rows, benchmark_rows)
    found = [make(evaluation) for make in first]
    found += [*needle_tables(evaluation), speed_rows(evaluation), *context_tables(evaluation)]
    return [table for table in (*found, score_rows(evaluation)) if table[1]]


def render_evaluation(result: Evaluation, console: Console) -> None:
    facts = f"{result.parameters:,} parameters, {result.split} split of {result.tokens}"
    beside = f", teacher {result.teacher}" if result.teacher else ""
    console.print(Text(f"{result.checkpoint}: {facts}{beside}"))
    for head, rows in tables(result.to_dict()):
        console.print(_table(head, rows))
    for note in result.notes:
        console.print(Text(note, "dim"))


def render_recursive(result: RecursiveEvaluation, console: Console) -> None:
    """The block of the models' own programs, then what it takes to judge it."""
    figures = result.figures
    console.print(Text(f"=== Inference Metrics ===\n{result.split}:"))
    for name in DOCUMENTED:
        console.print(Text(f"  {name}: {float(figures[name])!r}"))
    size = f"{figures['examples']:,} {result.kind}, {figures['tokens']:,} labels"
    facts = f"{result.parameters:,} parameters, {size} of {result.data}"
    console.print(Text(f"\n{result.checkpoint}: {facts}"))
    for head, rows in tables(result.to_dict()):
        console.print(_table(head, rows))
    for line in result.suspicious:
        console.print(Text(line, "bold yellow"))
    for note in result.notes:
        console.print(Text(note, "dim"))
    for name, path in result.files.items():
        console.print(Text(f"{name}: {path}"))


def render_selection(result: Selection, console: Console) -> None:
    head = ["checkpoint", "score", "bits/byte", "perplexity", "benchmark", "tokens/s"]
    rows = [
        [
            str(row["checkpoint"]),
            f"{row['score']:.4f}",
            _number(row["bits_per_byte"], ".3f"),
            _number(row["perplexity"], ",.2f"),
            _number(row["benchmark"], ".1%"),
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in result.ranking
    ]
    console.print(_table(head, rows))
    console.print(Text(f"best: {result.best}", "bold"))
    for note in result.notes:
        console.print(Text(note, "dim"))


def _table(head: Row, rows: Iterable[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(head):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _share(part: Mapping[str, Any]) -> str:
    """An accuracy with its standard error, which of 100 items is several per cent."""
    if part.get("accuracy") is None:
        return "not measured"
    error = part.get("standard_error")
    return f"{part['accuracy']:.1%}" + (f" ± {error:.1%}" if error is not None else "")


def _exp(nats: float | None) -> float | None:
    # Beyond 700 the exponential leaves the range of a float.
    return None if nats is None else math.exp(nats) if nats < 700 else math.inf


def _number(value: float | None, kind: str) -> str:
    return "none" if value is None else format(value, kind)


def _bytes(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"
