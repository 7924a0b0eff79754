"""The gate: whether what came out of a run is a language model, by five conditions.

1. The run's record has no NaN or Inf, and no guard stopped it for one.
2. Validation perplexity over the whole split is under the recipe's threshold; a student whose
   recipe has none is judged by the others.
3. The checkpoint is complete: every file has the sha256 of its manifest.
4. It loads, and what it generates has not degenerated.
5. Its size on disk is what the configuration implies.

Beside them stands the ladder of baselines (``baselines``), which decides nothing; of packed chunks,
which know neither whole documents nor their bytes, there is none.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble import artifacts
from thimble.config.load import CONFIG_FILE, load_run
from thimble.config.schema import Config
from thimble.errors import ConfigError, DataError
from thimble.evaluation import baselines
from thimble.evaluation.perplexity import evaluate_model, held_out
from thimble.evaluation.samples import WORD_TOKENS, Sample, held_out_samples
from thimble.generation.model import Model, load
from thimble.models.interop import WEIGHTS
from thimble.tokens import packing
from thimble.tokens.packed import PackedChunks
from thimble.tokens.packed_text import PackedText
from thimble.tokens.shards import TokenSplit, check_tokenizer
from thimble.training import checkpoint
from thimble.training.run import METRICS, RunFolder, read_records

if TYPE_CHECKING:
    from rich.console import Console

RESULT = "acceptance.json"
SPLITS = {"val": "validation", "test": "test"}
PERPLEXITY, TEXT = "{} perplexity", "generated text"  # names of conditions
REQUIRED = ("config.json", WEIGHTS, "generation_config.json", "trainer_state.json", "optimizer.pt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
SAMPLES = 8
DEGENERATE_ALLOWED = 2  # of the samples; a good model, too, may end a text at once or draw a table
FATAL = ("nan", "explosion")  # guard stops that say the training itself went wrong


@dataclass(frozen=True)
class Condition:
    """``ok`` is None where it could not be measured, since the checkpoint is damaged."""

    name: str
    wanted: str
    measured: str
    ok: bool | None


@dataclass(frozen=True)
class Rung:
    name: str
    bits_per_byte: float
    passed_by_model: bool


@dataclass(frozen=True)
class Acceptance:
    """What ``accept`` found; ``evaluation`` is ``evaluate_split``'s, empty where not measured."""

    checkpoint: Path
    run: Path
    recipe: str
    step: int | None
    split: str
    conditions: list[Condition]
    evaluation: dict[str, Any]
    ladder: list[Rung]
    samples: list[Sample]
    notes: list[str]
    created: str

    @property
    def accepted(self) -> bool:
        return all(condition.ok for condition in self.conditions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values as JSON holds them: paths are texts, and NaN and Inf are null."""
        return artifacts.plain({"accepted": self.accepted, **dataclasses.asdict(self)})

    def render(self, console: Console) -> None:
        """Print the conditions as a table, the ladder as bars, and what it says."""
        from thimble.evaluation.ladder import render

        render(self, console)


def accept(path: str | Path, *, split: str = "val", device: str = "auto") -> Acceptance:
    """Judge a run's best checkpoint (its latest where none was evaluated), or the one given.

    Writes ``acceptance.json`` into the run, and a model card, ``README.md``, into an accepted
    checkpoint. Raises DataError when the checkpoint is not part of a run or of an architecture
    that is not ours, when the run's record is missing, and when the tokens are missing or are not
    those it was trained on; ConfigError when its recipe has no gate, and for a split that packed
    chunks do not have.
    """
    if split not in SPLITS:
        raise ConfigError(f"The gate judges held-out text: split {' or '.join(SPLITS)}.")
    directory = checkpoint.resolve(path)
    run = _run_of(directory)
    manifest = artifacts.read_manifest(directory, checkpoint.KIND, make=checkpoint.MAKE)
    problems = _missing(manifest) + artifacts.damaged_files(directory, manifest, hashes=True)
    saved = not problems and (directory / CONFIG_FILE).is_file()
    config = load_run(directory if saved else run)
    chunks = packed(config.data.folder)
    student = chunks or config.objective.name == "distill"
    threshold = config.acceptance.perplexity
    if config.objective.name == "act" or (threshold is None and not student):
        raise ConfigError(
            f"{config.recipe} has no gate to be judged by. What it is measured by:\n"
            f"  thimble evaluate {path}"
        )
    if chunks and split != "val":
        raise ConfigError(f"{config.data.folder} holds out one split. Use:\n  --split val")
    step = manifest["options"].get("step")
    record = _record_condition(run / METRICS, step)
    whole = Condition(
        "checkpoint complete",
        "every file as in its manifest",
        "; ".join(problems) or f"{len(manifest['files'])} files, all with their sha256",
        not problems,
    )
    evaluation: dict[str, Any] = {}
    ladder: list[Rung] = []
    samples: list[Sample] = []
    notes: list[str] = []
    limit = "a number" if threshold is None else f"below {threshold:g}"
    if threshold is None:
        notes.append(
            f"{config.recipe} has no acceptance.perplexity: its perplexity is told, not judged."
        )
    if problems:
        why = "not measured: the checkpoint is damaged"
        perplexity = Condition(PERPLEXITY.format(SPLITS[split]), limit, why, None)
        text = Condition(TEXT, "loads and generates", why, None)
    else:
        data, evaluation, model = _measured(directory, manifest, config, split, device)
        value = evaluation["perplexity"]
        ok = math.isfinite(value) if threshold is None else value < threshold
        perplexity = Condition(PERPLEXITY.format(SPLITS[split]), limit, f"{value:.2f}", ok)
        samples, _ = held_out_samples(
            model,
            data,
            SAMPLES,
            temperature=config.evaluation.temperature,
            top_k=config.evaluation.top_k,
            seed=config.seed,
        )
        text = _text_condition(samples)
        if chunks:
            notes.append(
                f"No ladder of baselines: {config.data.folder} holds chunks, not whole documents."
            )
        else:
            measured = baselines.measure(config.data.folder, split)
            notes += measured["notes"]
            bits = evaluation["bits_per_byte"]
            rungs = sorted(measured["rungs"].items(), key=lambda rung: -rung[1])
            ladder = [Rung(name, value, bits < value) for name, value in rungs]
    result = Acceptance(
        checkpoint=directory,
        run=run,
        recipe=config.recipe,
        step=step,
        split=split,
        conditions=[record, perplexity, whole, text, _size_condition(directory, manifest, config)],
        evaluation=evaluation,
        ladder=ladder,
        samples=samples,
        notes=notes,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    artifacts.write_json(run / RESULT, result.to_dict())
    if result.accepted:
        from thimble.export.model_card import CARD, model_card

        artifacts.write_text(directory / CARD, model_card(result, config))
    return result


def _measured(
    directory: Path, manifest: Mapping[str, Any], config: Config, split: str, device: str
) -> tuple[TokenSplit | PackedText, dict[str, Any], Model]:
    """Held-out text, what ``evaluate_split`` gives of it, and the model."""
    length = config.training.sequence_length
    if not packed(config.data.folder):
        data = held_out(directory, manifest, config, split)
        model = load(directory, device)
        check_tokenizer(data.manifest, model.tokenizer, directory)
        return data, evaluate_model(model.nll, model, data, length), model
    from thimble.evaluation import students

    chunks = students.held_out(directory, config, split, [])
    assert isinstance(chunks, PackedChunks)
    model = load(directory, device)
    check_tokenizer(chunks.manifest, model.tokenizer, directory)
    figures = students.measure(model, chunks, length, None)
    return PackedText(chunks, model.tokenizer, WORD_TOKENS), figures, model


def packed(folder: str | Path) -> bool:
    """Whether a data folder holds packed chunks."""
    return artifacts.kind(folder) == packing.KIND


def stored(run: str | Path) -> Acceptance | None:
    """What ``accept`` found of a run before, if that still is its checkpoint, else None."""
    file = Path(run) / RESULT
    if not file.is_file():
        return None
    found = artifacts.read_json(file)
    if found.get("checkpoint") != str(checkpoint.resolve(run)) or not found.get("evaluation"):
        return None
    return Acceptance(
        checkpoint=Path(found["checkpoint"]),
        run=Path(found["run"]),
        conditions=[Condition(**condition) for condition in found["conditions"]],
        ladder=[Rung(**rung) for rung in found["ladder"]],
        samples=[Sample(**sample) for sample in found["samples"]],
        **{
            name: found[name]
            for name in ("recipe", "step", "split", "evaluation", "notes", "created")
        },
    )


def _run_of(directory: Path) -> Path:
    run = directory.resolve().parent.parent
    if not (run / CONFIG_FILE).is_file() or directory.resolve().parent.name != "checkpoints":
        raise DataError(
            f"{directory} is not a checkpoint in a run's folder, and the gate judges the run's "
            "record with it. Give a run, or runs/<recipe>/<time>-<slug>/checkpoints/step-NNNNNN."
        )
    return RunFolder(directory.parent.parent).path


def _missing(manifest: Mapping[str, Any]) -> list[str]:
    files = manifest.get("files", {})
    missing = [name for name in REQUIRED if name not in files]
    if not any(name in files for name in TOKENIZERS):
        missing.append(TOKENIZERS[0])
    return [f"{name} is missing" for name in missing]


def _record_condition(path: Path, step: int | None) -> Condition:
    """No NaN or Inf in what led to and followed the checkpoint.

    A run that was stopped and resumed from before the stop has left it behind: its records from
    there on were made again, and its guard stop no longer counts.
    """
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; without the run's record nothing says how its training went."
        )
    records = 0
    stops: list[Mapping[str, Any]] = []
    bad: list[str] = []
    for record in read_records(path):
        event = record.get("event")
        if event == "guard":
            stops.append(record)
        elif event == "resumed":
            stops = [stop for stop in stops if stop["step"] < record["step"]]
        elif event is None:
            records += 1
            bad += [f"{key} {value} at step {record['step']}" for key, value in _not_finite(record)]
    fatal = [stop for stop in stops if stop.get("kind") in FATAL]
    bad += [f"stopped at step {stop['step']}: {stop['reason']}" for stop in fatal]
    if not records:
        raise DataError(f"{path} holds no records; the run has not trained.")
    measured = f"{records} records, none"
    if bad:
        measured = bad[0] + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
    elif stops:
        measured += f"; stopped at step {stops[-1]['step']}: {stops[-1]['reason']}"
    return Condition("training record", "no NaN or Inf", measured, not bad)


def _not_finite(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if not isinstance(value, float) or math.isfinite(value):
            continue
        # Under float16 an infinite norm only lowers the gradient scale; elsewhere a guard stops it.
        if key != "grad_norm" or math.isnan(value):
            yield key, value


def _text_condition(samples: list[Sample]) -> Condition:
    problems = [sample.problem for sample in samples if sample.problem]
    measured = f"loads; {len(samples) - len(problems)} of {len(samples)} texts sound"
    if problems:
        measured += f" ({'; '.join(sorted(set(problems)))})"
    return Condition(
        TEXT,
        f"loads, {len(samples) - DEGENERATE_ALLOWED} of {len(samples)} texts not degenerate",
        measured,
        len(problems) <= DEGENERATE_ALLOWED,
    )


def _size_condition(directory: Path, manifest: Mapping[str, Any], config: Config) -> Condition:
    """Weights on disk against parameters x 4 bytes: checkpoints are saved in float32."""
    expected = 4 * config.model.num_parameters
    tolerance = config.acceptance.size_tolerance
    files = [directory / name for name in manifest["files"]]
    parts = {file.name: file.stat().st_size for file in files if file.is_file()}
    size = parts.pop(WEIGHTS, 0)
    large = [f"{name} {_megabytes(n)}" for name, n in parts.items() if n >= max(size, 1) // 20]
    return Condition(
        "size on disk",
        f"{_megabytes(expected)} ± {tolerance:.0%}",
        f"{WEIGHTS} {_megabytes(size)} ({size / expected - 1:+.1%})"
        + (f"; beside it {', '.join(sorted(large))}" if large else ""),
        abs(size - expected) <= tolerance * expected,
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
