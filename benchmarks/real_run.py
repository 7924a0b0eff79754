"""A recipe from its tokens to its files, with every figure of it in one page under docs/results.

    python benchmarks/real_run.py slm_nano [key=value ...]

Plan, training, the gate, evaluation of every checkpoint, quantization, export to GGUF and ONNX, and
the report, one after the other, as `thimble VERB` does it. Existing quantized and exported files of
a run are not made again. `--run RUN` takes a finished run instead of training one.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import thimble
from thimble import api, console
from thimble.artifacts import read_json, versions
from thimble.evaluation.evaluate import Evaluation, Selection
from thimble.evaluation.tables import tables
from thimble.training.devices import describe, resolve_device
from thimble.training.forecast import Forecast

RESULTS = Path("docs/results")
GGUF_TYPES = ("F16", "Q8_0", "Q4_K_M")
MIB = 2**20


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in lines
    )


def exported(run: Path, kind: str, **options: Any) -> dict[str, Any]:
    """The manifest of an export, made now unless it is there."""
    name = (
        f"{run.parent.name}-{options['type']}.gguf" if kind == "gguf" else f"{run.parent.name}.onnx"
    )
    manifest = run / "export" / f"{name}.json"
    if not manifest.is_file():
        getattr(api, f"export_{kind}")(run, **options)
    return read_json(manifest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    console.setup(0)

    started = time.time()
    plan = api.plan(arguments.recipe, *arguments.overrides)
    assert isinstance(plan, Forecast)
    run = arguments.run or api.train(arguments.recipe, *arguments.overrides, retry=3).path
    accepted = api.accept(run)
    selection = api.evaluate(run, every=True)
    best = api.evaluate(run)
    assert isinstance(selection, Selection)
    assert isinstance(best, Evaluation)
    made = list((run / "quantized").glob("*"))
    quantized = (
        read_json(made[0] / "quantization_summary.json") if made else api.quantize(run).to_dict()
    )
    files = {kind: exported(run, "gguf", type=kind) for kind in GGUF_TYPES}
    onnx = exported(run, "onnx")
    report = api.report(run)

    records = [r for r in thimble.training.run.RunFolder(run).records() if "loss" in r]
    last = records[-1]
    device = resolve_device("auto")
    measured = plan.here.get("peak_measured")
    parts = {
        "Run": table(
            ["", ""],
            [
                ["parameters", f"{best.parameters:,}"],
                ["steps", f"{last['step']:,} of {plan.plan.tokens_per_step:,} tokens"],
                ["tokens", f"{last['tokens']:,}, {last['epoch']:.2f} epochs"],
                [
                    "time in training",
                    f"{last['seconds']:.0f} s, {last['tokens'] / last['seconds']:,.0f} tokens/s",
                ],
                ["peak memory, planned", f"{plan.memory.total / MIB:,.0f} MiB"],
                [
                    "peak memory, measured by the plan",
                    f"{measured / MIB:,.0f} MiB" if measured else "no",
                ],
                [
                    "peak memory of the process that did all of this, in training",
                    f"{last['memory_bytes'] / MIB:,.0f} MiB",
                ],
            ],
        ),
        "Gate": table(
            ["condition", "wanted", "measured", "passed"],
            [[c.name, c.wanted, c.measured, "yes" if c.ok else "no"] for c in accepted.conditions],
        ),
        "Baselines, bits per byte": table(
            ["baseline", "bits/byte", "passed"],
            [
                [r.name, f"{r.bits_per_byte:.3f}", "yes" if r.passed_by_model else "no"]
                for r in accepted.ladder
            ]
            + [["this model", f"{accepted.evaluation['bits_per_byte']:.3f}", ""]],
        ),
        "Evaluation": "\n\n".join(table(head, rows) for head, rows in tables(best.to_dict())),
        "Checkpoints": table(
            ["step", "score", "perplexity", "bits/byte", "benchmark"],
            [
                [
                    f"{row['step']:,}",
                    f"{row['score']:.4f}",
                    f"{row['perplexity']:.2f}",
                    f"{row['bits_per_byte']:.3f}",
                    f"{row['benchmark']:.1%}" if row["benchmark"] is not None else "none",
                ]
                for row in selection.ranking
            ],
        ),
        "Quantized": table(
            ["weights", "perplexity before", "after", "rise", "bytes", "verdict"],
            [
                [
                    rung["name"],
                    f"{rung['perplexity_before']:.3f}",
                    f"{rung['perplexity']:.3f}",
                    f"{rung['rise']:+.2%}",
                    f"{rung['bytes']:,}",
                    rung["verdict"],
                ]
                for rung in quantized["rungs"]
            ],
        ),
        "GGUF in llama.cpp": gguf_table(files),
        "ONNX in onnxruntime": table(["", ""], [[k, str(v)] for k, v in onnx["checks"].items()]),
    }
    kept = ", ".join(f"{name} {version}" for name, version in versions(
        "torch", "transformers", "llama-cpp-python", "gguf", "onnxruntime", "neural-compressor-pt"
    ).items())  # fmt: skip
    taken = ["--run", str(arguments.run)] if arguments.run else []
    words = " ".join([arguments.recipe, *arguments.overrides, *taken])
    text = [
        f"# {arguments.recipe}",
        f"{time.strftime('%Y-%m-%d', time.gmtime(started))}, {describe(device)}, "
        f"{platform.system()} {platform.machine()}; {kept}.",
        f"Made by `python benchmarks/real_run.py {words}`.",
        f"The [report]({arguments.recipe}.html) of the run has its curves and samples.",
    ]
    for heading, body in parts.items():
        text += [f"## {heading}", body]
    text += [f"- {note}" for note in best.notes]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{arguments.recipe}.md").write_text("\n\n".join(text) + "\n")
    shutil.copyfile(report.path, RESULTS / f"{arguments.recipe}.html")
    print(RESULTS / f"{arguments.recipe}.md", torch.__version__)


def gguf_table(files: dict[str, dict[str, Any]]) -> str:
    rows = []
    for kind, facts in files.items():
        checks, speed = facts["checks"], facts["speed"]
        logits, greedy = checks["logits"], checks["greedy"]
        rows.append(
            [
                kind,
                f"{facts['file']['bytes']:,}",
                f"{logits['argmax_agreement']:.3%}",
                f"{greedy['tokens'] - greedy['differing']} of {greedy['tokens']}",
                f"{logits['mean_kl_nats']:.2g}",
                f"{logits['perplexity']['file']:.3f} "
                f"({logits['perplexity']['difference_percent']:+.3f} %)",
                f"{speed['generated_tokens_per_second']:,.0f}",
            ]
        )
    head = [
        "type",
        "bytes",
        "same argmax",
        "same greedy tokens",
        "KL, nats",
        f"perplexity of {files['F16']['checks']['logits']['tokens']:,} tokens",
        "tokens/s",
    ]
    return table(head, rows)


if __name__ == "__main__":
    main()
