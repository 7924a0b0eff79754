"""What the page of a recursive run holds beside that of any run: figures by supervision step, what
counting alone reaches, answers, puzzles, the comparison, and what is too good to be true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thimble import artifacts
from thimble.compare import kind_of, recurs
from thimble.config.schema import Config
from thimble.conversations.dataset import Conversations
from thimble.errors import ThimbleError
from thimble.evaluation.comparison import LEDGER, RECURSIVE, table
from thimble.evaluation.labels import label_baselines, suspicious
from thimble.evaluation.recursive import choose
from thimble.evaluation.request import fingerprint_of_run
from thimble.puzzles.dataset import Metadata
from thimble.puzzles.loader import Split
from thimble.report import charts
from thimble.report.charts import Chart
from thimble.report.puzzles import drawings
from thimble.training.recursion import SHOWN
from thimble.training.run import RunFolder

EXPLAINED = "explained.txt"  # a person's explanation of figures that look too good
SEPARATOR = "\n\n---\n\n"  # between the samples of a step


@dataclass
class Section:
    """``context`` is for the template; ``charts`` come before the curves."""

    context: dict[str, Any]
    charts: list[Chart] = field(default_factory=list)


def gather(
    run: RunFolder,
    config: Config,
    evaluations: list[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    missing: list[str],
) -> Section:
    """All of it that the run's folder and its data give; what they do not is named in ``missing``.

    ``evaluations``: the records of the held-out data during training; ``evaluation``: the best
    checkpoint's ``evaluation_report.json``.
    """
    data = _data(config, run, missing)
    conversations = data.get("opened")
    comparison = compared(run, config, missing)
    section = Section(
        {
            "flags": _flags(evaluations, evaluation, data),
            "explanation": _text(run.path / EXPLAINED),
            "explain_in": str(run.path / EXPLAINED),
            "comparison": comparison,
            "answers": _answers(run, conversations) if conversations else [],
            "puzzles": _puzzles(run, config, data, missing),
            "data": data,
        }
    )
    section.charts = list(_charts(config, evaluations, evaluation, conversations, comparison))
    return section


# --------------------------------------------------------------------------------------- figures


def _charts(
    config: Config,
    evaluations: list[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    conversations: Conversations | None,
    comparison: dict[str, Any] | None,
) -> Iterator[Chart]:
    if evaluation:
        split, by_step = evaluation["split"], evaluation["figures"]["by_step"]
    else:
        split = "val" if conversations else "test"
        last = evaluations[-1] if evaluations else {}
        by_step = last.get("val_by_step") or []
    if comparison and comparison["curves"]:
        puzzles = comparison["kind"] == "puzzles"
        yield charts.comparison_chart(comparison["curves"], exact=puzzles)
    baselines, bits = _baselines(evaluations, evaluation, conversations)
    if baselines and bits is not None:
        yield charts.ladder_chart(baselines, config.recipe, bits)
    if by_step:
        yield from charts.step_charts(by_step, split)
    if evaluation:
        yield charts.halting_chart(evaluation["figures"]["halting_histogram"], split)


def _baselines(
    evaluations: list[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    conversations: Conversations | None,
) -> tuple[dict[str, float], float | None]:
    """Bits per byte of models that only count, and of the model on the same split."""
    if evaluation and evaluation.get("baselines"):
        counted, bits = evaluation["baselines"], evaluation["figures"]["bits_per_byte"]
    elif conversations and evaluations and len(conversations.split("val")):
        counted = label_baselines(conversations, "val")
        bits = evaluations[-1].get("val_bits_per_byte")
    else:
        return {}, None
    ending = "_bits_per_byte"
    return {k.removesuffix(ending): v for k, v in counted.items() if k.endswith(ending)}, bits


def _flags(
    evaluations: list[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    data: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Figures that no small model reaches on free text, and what the data's own checks found."""
    found = []
    if data.get("suspicious"):
        found.append({"of": "The data's own checks", "lines": data["suspicious"]})
    if evaluation and evaluation.get("suspicious"):
        where = f"The {evaluation['split']} split"
        found.append({"of": where, "lines": evaluation["suspicious"]})
    for record in reversed(evaluations):
        kind = "conversations" if "val_perplexity" in record else "puzzles"
        figures = {"exact_accuracy": record["val_exact_accuracy"], "nll": record["val_loss"]}
        lines = suspicious(figures, kind, data.get("raw_checks"))
        if lines:
            where = f"Held-out figures while training, step {record['step']:,}"
            found.append({"of": where, "lines": lines})
            break
    return found


def compared(run: RunFolder, config: Config, missing: list[str]) -> dict[str, Any] | None:
    """``comparison.json`` of a run, with its table and its curves."""
    path = run.path / LEDGER
    if not path.is_file():
        if recurs(config.model):  # and is not one of the plain ones itself
            missing.append(f"{LEDGER}: thimble compare --run {run.path}")
        return None
    found = artifacts.read_json(path)
    if found["waiting"]:
        missing.append(
            f"{', '.join(found['waiting'])}: thimble compare --resume {run.path}",
        )
    head, rows = table(found)
    key = "val_exact_accuracy" if found["kind"] == "puzzles" else "val_loss"
    curves = []
    for row in found["rows"]:
        folder = run if row["name"] == RECURSIVE else RunFolder(row["run"])
        each = row["flops"] / row["updates"]
        points = [(r["step"] * each, r[key]) for r in folder.records() if key in r]
        if points:
            curves.append((row["name"], points))
    return {**found, "head": head, "cells": rows, "curves": curves}


# ------------------------------------------------------------------------------ answers, puzzles


def _answers(run: RunFolder, data: Conversations) -> list[dict[str, str]]:
    """The last samples taken apart: question, the model's answer, the given one."""
    files = sorted(run.samples.glob("step-*.txt"))
    numbers = choose(data.split("val"), SHOWN)
    said = (_text(files[-1]) or "").removesuffix("\n").split(SEPARATOR) if files else []
    tokenizer, found = data.tokenizer(), []
    for number, text in zip(numbers, said, strict=False):
        ids, _ = data.example(int(number))
        prompt = int(data.examples["prompt"][number])
        asked, given = (tokenizer.decode(list(part)) for part in (ids[:prompt], ids[prompt:-1]))
        end = f"\n(given: {given})"
        if text.startswith(asked) and text.endswith(end):
            answer = text.removeprefix(asked).removesuffix(end)
            found.append({"asked": asked, "said": answer, "given": given})
    return found


def _puzzles(
    run: RunFolder, config: Config, data: Mapping[str, Any], missing: list[str]
) -> dict[str, Any] | None:
    directory = run.pointed("best") or run.pointed("latest")
    if data["kind"] != "puzzles":
        return None
    if directory is None:
        missing.append(f"drawings of puzzles: {run.path} has no checkpoint yet")
        return None
    if data["fingerprint"] != fingerprint_of_run(directory):
        missing.append(f"drawings of puzzles: {config.data.folder} was built again since")
        return None
    made = drawings(directory, config)
    if made is None:
        missing.append("drawings of puzzles: they are of none of the kinds that are known here")
    return made


# ------------------------------------------------------------------------------------------ data


def _data(config: Config, run: RunFolder, missing: list[str]) -> dict[str, Any]:
    """Counts and checks of the conversations or puzzles, where they are still there."""
    folder = Path(config.data.folder)
    found: dict[str, Any] = {"path": str(folder), "kind": None, "lost": [], "rows": [], "head": []}
    try:
        if kind_of(config) == "conversations":
            return found | _conversations(Conversations(folder))
        return found | _puzzle_set(folder)
    except ThimbleError as error:
        missing.append(f"data: {str(error).splitlines()[0]}")
        return found


def _conversations(data: Conversations) -> dict[str, Any]:
    from thimble.conversations.build import truncation_notes

    counts, checks = data.counts, data.checks
    names = ("train", "val", "test")
    parts = {name: data.examples[data.split(name)] for name in names}
    return {
        "kind": "conversations",
        "opened": data,
        "head": ["split", "examples", "tokens", "labels", "mean length"],
        "rows": [
            [
                name,
                f"{len(part):,}",
                f"{int(part['length'].sum()):,}",
                f"{int(part['labelled'].sum()):,}",
                f"{part['length'].mean():.1f}" if len(part) else "",
            ]
            for name, part in parts.items()
        ],
        "lost": truncation_notes(counts),
        "counts": _flat(counts),
        "checks": _flat({k: v for k, v in checks.items() if k != "suspicious"}),
        "raw_checks": checks,
        "suspicious": checks["suspicious"],
    }


def _puzzle_set(folder: Path) -> dict[str, Any]:
    names = ("train", "test")
    splits = {name: Metadata.read(folder / name) for name in names}
    manifest = folder / artifacts.MANIFEST
    counts = artifacts.read_json(manifest)["counts"] if manifest.is_file() else {}
    return {
        "kind": "puzzles",
        "fingerprint": Split(folder, "train").fingerprint,
        "head": ["split", "groups", "puzzles", "cells", "symbols", "identifiers"],
        "rows": [
            [
                name,
                f"{each.total_groups:,}",
                f"{each.total_puzzles:,}",
                f"{each.seq_len:,}",
                f"{each.vocab_size:,}",
                f"{each.num_puzzle_identifiers:,}",
            ]
            for name, each in splits.items()
        ],
        "counts": _flat(counts),
        "checks": [],
    }


def _flat(tree: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in tree.items():
        key = before + name.replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(value, f"{key} / ")
        else:
            whole = isinstance(value, int) and not isinstance(value, bool)
            number = f"{value:,}" if whole else f"{value:.6g}" if isinstance(value, float) else None
            rows.append((key, number or str(value)))
    return rows


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
