"""What a run left behind, gathered and set as one HTML page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thimble import __version__, artifacts
from thimble.config.describe import as_override, keys
from thimble.config.load import load_run
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import DataError, ThimbleError
from thimble.report import students
from thimble.report.charts import (
    LOSS,
    Chart,
    comparison_chart,
    curve_charts,
    ladder_chart,
    recursive_curves,
)
from thimble.tokens import packing
from thimble.tokens.shards import corpus_of
from thimble.training.run import RunFolder, told_underway

PAGE, PLOTS = "report.html", "plots"
EVALUATION = "evaluation_report.json"


@dataclass(frozen=True)
class Report:
    """``missing``: what the run does not have (yet), so the page has no section for it."""

    path: Path
    plots: list[Path]
    missing: list[str]


def report(path: str | Path) -> Report:
    """Write ``report.html`` and ``plots/*.png`` into a run, from what its folder holds.

    Raises DataError when it is no run or has no record yet. Acceptance,
    evaluation, attempts and the statistics of tokens and corpus are shown where they are found;
    otherwise ``missing`` names the command that makes them.
    """
    run = RunFolder.containing(path)
    config = load_run(run.path)
    records = run.records()
    training = [record for record in records if "loss" in record]
    if not training:
        raise DataError(
            f"{run.path} has no record of training yet, so there is nothing to report. "
            f"Train first:\n  thimble train --resume {run.path}"
        )
    evaluations = [record for record in records if "val_loss" in record]
    events = [record for record in records if "event" in record]
    missing: list[str] = []
    recursive = config.objective.name == "act"
    # The gate is for text alone.
    judge = None if recursive else f"thimble accept {run.path}"
    acceptance = _read(run.path / "acceptance.json", judge, missing)
    evaluation = _evaluation(run, missing)
    attempts = _read(run.path / "attempts.json", None, missing) or []
    rungs = {rung["name"]: rung["bits_per_byte"] for rung in (acceptance or {}).get("ladder", [])}
    first = recursive_curves(config.objective.per_sequence) if recursive else LOSS + students.CURVES
    charts = list(curve_charts(training, evaluations, events, rungs, first))
    charts = [*students.charts(evaluation), *charts]
    section = None
    if recursive:
        from thimble.report.recursion import gather

        section = gather(run, config, evaluations, evaluation, missing)
        charts = [*section.charts, *charts]
        comparison = section.context["comparison"]
    else:
        comparison = _comparison(run, config, missing)
        if comparison and comparison["curves"]:
            charts.insert(0, comparison_chart(comparison["curves"], exact=False))
    if rungs and (acceptance or {}).get("evaluation"):
        bits = acceptance["evaluation"]["bits_per_byte"]
        charts.insert(0, ladder_chart(rungs, config.recipe, bits))
    facts = {
        "recipe": config.recipe,
        "parameters": f"{config.model.num_parameters:,}",
        "state": _state(events, run),
        "steps": f"{training[-1]['step']:,}",
        "tokens seen": f"{training[-1]['tokens']:,} ({training[-1]['epoch']:.2f} epochs)",
        "time in training": f"{training[-1]['seconds'] / 60:.1f} minutes",
        "best checkpoint": str(run.pointed("best") or "none yet"),
    }
    if section and not run.pointed("best"):  # puzzles are held out once only, so none is chosen
        del facts["best checkpoint"]
        facts["last checkpoint"] = str(run.pointed("latest") or "none yet")
    html = _template().render(
        title=f"{config.recipe}: {run.path.name}",
        version=__version__,
        facts=facts,
        acceptance=acceptance,
        evaluation=evaluation,
        saddles=students.saddles(events),
        attempts=[_attempt(attempt) for attempt in attempts],
        charts=charts,
        samples=_samples(run),
        settings=_settings(config),
        recursion=section.context if section else None,
        comparison=comparison,
        data=None if section else _data(config, missing),
        zipf=_zipf(config),
        missing=missing,
    )
    artifacts.write_text(run.path / PAGE, html)
    plots = [_write(run.path / PLOTS / f"{chart.name}.png", chart) for chart in charts]
    return Report(run.path / PAGE, plots, missing)


def _template() -> Any:
    import jinja2

    loader = jinja2.PackageLoader("thimble.report", ".")
    # Samples and paths come from outside: everything is escaped unless it is our own drawing.
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html")


def _read(path: Path, make: str | None, missing: list[str]) -> Any:
    if path.is_file():
        return artifacts.read_json(path)
    if make:
        missing.append(f"{path.name}: {make}")
    return None


def _evaluation(run: RunFolder, missing: list[str]) -> dict[str, Any] | None:
    """The best checkpoint's evaluation as tables, where there is one."""
    best = run.pointed("best") or run.pointed("latest")
    found = _read(best / EVALUATION, f"thimble evaluate {run.path}", missing) if best else None
    if found is None:
        return None
    from thimble.evaluation.tables import tables

    return {**found, "tables": [{"head": head, "rows": rows} for head, rows in tables(found)]}


def _comparison(run: RunFolder, config: Config, missing: list[str]) -> dict[str, Any] | None:
    """What recursion was worth to a model of text, where its stack runs again and again."""
    if config.model.schedule != "recursive":
        return None
    from thimble.report.recursion import compared

    return compared(run, config, missing)


def _state(events: list[dict[str, Any]], run: RunFolder) -> str:
    events = [event for event in events if not told_underway(event)]
    if not events or events[-1]["event"] == "resumed":
        return "running, or ended without a word"
    last = events[-1]
    if last["event"] == "guard":
        return f"stopped at step {last['step']:,}: {last['reason']}"
    return f"{last['event']} at step {last['step']:,}"


def _attempt(attempt: dict[str, Any]) -> dict[str, Any]:
    changes = (
        f"{key}: {as_override(change['from'])} to {as_override(change['to'])}"
        for key, change in attempt.get("change", {}).items()
    )
    return {
        "number": attempt["attempt"],
        "started": attempt["started"],
        "outcome": attempt["outcome"],
        "reason": attempt.get("reason", ""),
        "change": "; ".join(changes),
    }


def _samples(run: RunFolder) -> list[dict[str, str]]:
    """First, middle and last samples: enough to see it learn, few enough to read."""
    files = sorted(run.samples.glob("step-*.txt"))
    chosen = sorted({round(i * (len(files) - 1) / 4) for i in range(5)}) if files else []
    return [
        {
            "step": f"{int(files[i].stem.removeprefix('step-')):,}",
            "text": files[i].read_text(encoding="utf-8", errors="replace"),
        }
        for i in chosen
    ]


def _settings(config: Config) -> list[dict[str, str]]:
    tree, rows = config.model_dump(mode="json"), []
    for key, field in keys().items():
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        rows.append({"key": key, "value": as_override(value), "meaning": field.description or ""})
    return rows


def _data(config: Config, missing: list[str]) -> dict[str, Any]:
    """Counts of the tokens and, where it is still there, of the corpus behind them."""
    found: dict[str, Any] = {"path": config.data.path, "splits": {}, "cleaning": [], "mixture": {}}
    found["notes"] = []
    try:
        if artifacts.kind(config.data.folder) == packing.KIND:  # which knows no corpus
            packed = artifacts.read_json(Path(config.data.folder) / artifacts.MANIFEST)
            return found | _packed(config, packed)
        tokens = artifacts.read_manifest(config.data.folder, "tokens", make="thimble tokens build")
    except ThimbleError as error:
        missing.append(f"tokens: {str(error).splitlines()[0]}")
        return found
    found["splits"] = tokens["counts"]
    found["vocabulary"] = tokens["vocab_size"]
    folder = corpus_of(config.data.folder, tokens)
    if folder:
        corpus = artifacts.read_json(folder / artifacts.MANIFEST)
        found["corpus"] = str(folder)
        found["cleaning"] = corpus.get("cleaning", [])
        found["mixture"] = corpus.get("by_category", {})
    else:
        name = (tokens["inputs"].get("corpus") or {}).get("name", "")
        missing.append(f"corpus {name}: not in data/corpus any more, or made anew")
    return found


def _packed(config: Config, manifest: dict[str, Any]) -> dict[str, Any]:
    """Counts of chunks; where documents of another folder are held out, the folder."""
    counts, other = manifest["counts"], config.data.val_path
    notes = [f"{manifest['max_seq_length']:,} tokens in each chunk"]
    notes.append(f"left out: {counts['empty']:,} empty texts, {counts['refused']:,} unreadable")
    if other not in (None, config.data.path):
        notes.append(f"held out: {other}, without what is trained on")
    return {
        "vocabulary": manifest["vocab_size"],
        "notes": notes,
        "splits": {split: counts[split] for split in packing.SPLITS},
    }


def _zipf(config: Config) -> str | None:
    path = Path(config.data.folder) / "zipf.png"
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def _write(path: Path, chart: Chart) -> Path:
    with artifacts.atomic_file(path) as temporary:
        temporary.write_bytes(chart.png)
    log.debug("wrote %s", path)
    return path
