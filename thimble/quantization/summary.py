"""What ``thimble quantize`` tried, as a table on a terminal and as the folder's ``README.md``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from thimble.quantization import packed

if TYPE_CHECKING:
    from rich.console import Console

    from thimble.quantization.ladder import Quantization, Rung

CARD = "README.md"
HEADINGS = (
    *("weights", "calibration windows", "perplexity before", "after", "rise", "bytes expected"),
    *("measured", "seconds", "verdict"),
)


def render(result: Quantization, console: Console) -> None:
    verdict = (
        Text("accepted", "bold green") if result.accepted else Text("not accepted", "bold red")
    )
    console.print(Text(f"{result.path}: ").append_text(verdict))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for rung in result.rungs:
        table.add_row(*map(Text, _row(rung)))
    console.print(table)
    for line in _sentences(result):
        console.print(Text(line))


def _row(rung: Rung) -> tuple[str, ...]:
    return (
        rung.name,
        f"{rung.calibration_windows:,}",
        f"{rung.perplexity_before:.3f}",
        f"{rung.perplexity:.3f}",
        f"{rung.rise:+.2%}",
        f"{rung.bytes_expected:,}",
        f"{rung.bytes:,}",
        f"{rung.seconds:.1f}",
        "passed" if rung.passed else "failed",
    )


def _sentences(result: Quantization) -> list[str]:
    kept, smaller = result.unquantized, result.compression
    lines = [
        f"Groups of {result.group_size} columns share a scale. The embedding, the head and the "
        f"norms, {kept['share']:.1%} of the parameters, stay {kept['dtype']}.",
        f"All tensors together: {smaller['float32']:.2f} times smaller than in float32, "
        f"{smaller['float16']:.2f} times smaller than in float16.",
        f"Perplexity is of {result.test_tokens:,} tokens of the test split, in windows of "
        f"{result.sequence_length}; calibration saw the validation split only.",
    ]
    if not result.accepted:
        lines.append(
            f"Not accepted: {result.rungs[-1].verdict}. Nothing tried passed, eight bits included; "
            "this model would have to be trained for few bits, which thimble does not do."
        )
    return lines + result.notes


def card(result: Quantization) -> str:
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *map(_row, result.rungs)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = "\n\n".join(_sentences(result))
    verdict = "accepted" if result.accepted else "NOT ACCEPTED"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {result.path.name}\n\n"
        f"{result.checkpoint.name}, weights quantized by GPTQ (arXiv:2210.17323): {verdict}. The "
        f"weights are those of the last row.\n\n{table}\n\n{text}\n\n"
        "thimble loads this folder as it is, and transformers where "
        f"`{packed.METHOD}` is installed.\n"
    )
