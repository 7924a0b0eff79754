"""Everything measured of a checkpoint, and the choice among several.

held-out text -> loss, perplexity, bits per byte, accuracy, calibration, by category
the same, beside the teacher of a student -> divergence from it, agreement
generated text -> length, repetition, coherence, beside the real continuations
needles, context -> what is remembered over how far, and at what cost (where it is asked for)
speed, the operating-system benchmark, tasks of lm-evaluation-harness -> one weighted score
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble import artifacts
from thimble.config.load import CONFIG_FILE, load_run
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import ConfigError, DataError
from thimble.evaluation import context, domain, needle, reading, speed, students
from thimble.evaluation.samples import (
    WORD_TOKENS,
    Text,
    held_out_samples,
    known_words,
    text_figures,
)
from thimble.generation.model import Model, load
from thimble.models import interop
from thimble.teachers.direct import DirectTeacher
from thimble.tokens.packed import PackedChunks
from thimble.tokens.packed_text import PackedText
from thimble.tokens.shards import TokenSplit, check_tokenizer
from thimble.training import checkpoint

if TYPE_CHECKING:
    from rich.console import Console

    from thimble.evaluation.evaluate_recursive import RecursiveEvaluation

REPORT, SELECTION = "evaluation_report.json", "best_checkpoint_selection.json"
SPLITS = ("val", "test")
TEXTS = 16
SHOWN = 4
MOST_TEXT = 1 << 22  # tokens of the haystack
MMLU = "mmlu"
# The specification's weights, and the value at which a part is full.
WEIGHTS = {"perplexity": 0.4, "os": 0.3, "mmlu": 0.2, "speed": 0.1}
FULL_PERPLEXITY, FULL_SPEED = 10.0, 50.0


@dataclass(frozen=True)
class Evaluation:
    """``figures`` are ``students.measure``'s, ``needle`` is ``needle.search``'s, ``context``
    ``context.measure``'s; what was not measured is None, and ``notes`` say why."""

    checkpoint: Path
    recipe: str | None
    step: int | None
    parameters: int
    split: str
    tokens: Path
    tokens_fingerprint: str
    teacher: str | None
    figures: dict[str, Any]
    generated: dict[str, Any]
    real: dict[str, Any]
    speed: dict[str, Any]
    benchmark: dict[str, Any] | None
    tasks: dict[str, Any] | None
    needle: dict[str, Any] | None
    context: dict[str, Any] | None
    score: dict[str, float]
    samples: list[dict[str, Any]]
    notes: list[str]
    created: str

    def to_dict(self) -> dict[str, Any]:
        return artifacts.plain(dataclasses.asdict(self))

    def render(self, console: Console) -> None:
        from thimble.evaluation.tables import render_evaluation

        render_evaluation(self, console)


@dataclass(frozen=True)
class Selection:
    """Several checkpoints by their weighted score, the best first."""

    best: Path
    ranking: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]
    path: Path

    def to_dict(self) -> dict[str, Any]:
        return artifacts.plain(dataclasses.asdict(self))

    def render(self, console: Console) -> None:
        from thimble.evaluation.tables import render_selection

        render_selection(self, console)


def evaluate(
    path: str | Path,
    *,
    split: str = "test",
    tokens: str | Path | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    teacher: str | Path | None = None,
    needle: bool = False,
    context: bool = False,
    lengths: Sequence[int] = (),
    device: str = "auto",
    **recursive: Any,
) -> Evaluation | RecursiveEvaluation:
    """Measure a checkpoint, or a run's best one, and write ``evaluation_report.json`` into it.

    A checkpoint of ours knows its tokens; for another one (a llama or mistral of transformers)
    ``tokens`` names the directory, which must be of its tokenizer. ``tasks`` are names of
    lm-evaluation-harness, or YAML files of tasks; ``limit`` bounds the items of each. A student is
    held against the ``teacher`` it learned from, any other model against one that is named here.
    ``needle`` hides facts in contexts of ``lengths`` tokens, ``context`` takes time and memory over
    them. ``recursive`` are those of ``request.Request``, for checkpoints of recursive models, which
    have none of these.
    """
    directory = checkpoint.resolve(path)
    own: dict[str, Any] = {"tokens": tokens, "tasks": tasks, "limit": limit, "teacher": teacher}
    own |= {"needle": needle, "context": context, "lengths": lengths}
    others = own if is_recursive(directory) else recursive
    if given := [name.replace("_", "-") for name, value in others.items() if value]:
        which = "other models" if others is own else "recursive models"
        raise ConfigError(f"--{given[0]} is for {which}, and {directory} holds none.")
    if others is own:
        from thimble.evaluation.evaluate_recursive import evaluate_recursive
        from thimble.evaluation.request import Request

        request = Request(**recursive)
        return evaluate_recursive(directory, split=split, device=device, request=request)
    if split not in SPLITS:
        raise ConfigError(f"Only held-out text says something: split {' or '.join(SPLITS)}.")
    if tasks:
        from thimble.evaluation import harness

        harness.check()
    if lengths and not (needle or context):
        raise ConfigError("--lengths are of contexts: give --needle, --context, or both.")
    model, data, config, notes = open_checkpoint(directory, split, tokens, device)
    length = _length(config, model, data)
    found = students.find_teacher(directory, config, teacher, data, length, model.device, notes)
    text: Text = (
        PackedText(data, model.tokenizer, WORD_TOKENS) if isinstance(data, PackedChunks) else data
    )
    far = _far(model, text, found, length, needle, context, lengths, notes)
    # First, as their data may not be there.
    measured = harness.run(directory, tasks, limit, model.device) if tasks else None
    figures = students.measure(model, data, length, found.teacher if found else None)
    if math.isnan(figures["loss"]):
        raise DataError(
            f"The loss of {directory} on the {split} split is not a number: its weights are "
            "damaged. Evaluate an earlier checkpoint."
        )
    generated, real, samples = _texts(model, text, config)
    benchmark = _benchmark(model, data, notes)
    pace = speed.measure(model)
    if not tasks or MMLU not in (measured or {}):
        notes.append("MMLU was not measured and counts 0 in the score: --tasks mmlu")
    result = Evaluation(
        checkpoint=directory,
        recipe=config.recipe if config else None,
        step=_step(directory),
        parameters=model.network.num_parameters(),
        split=data.split or "val",
        tokens=data.directory,
        tokens_fingerprint=data.manifest["fingerprint"],
        teacher=found.name if found else None,
        figures=figures,
        generated=generated,
        real=real,
        speed=pace,
        benchmark=benchmark,
        tasks=measured,
        **far,
        score=weighted_score(
            figures["perplexity"],
            benchmark["accuracy"] if benchmark else None,
            measured[MMLU]["accuracy"] if measured and MMLU in measured else None,
            pace["tokens_per_second"],
        ),
        samples=samples,
        notes=notes,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    try:
        artifacts.write_json(directory / REPORT, result.to_dict())
    except OSError as error:  # what was measured in minutes is shown all the same
        notes.append(f"{directory / REPORT} could not be written: {error.strerror}.")
    return result


def select(paths: Sequence[str | Path], **options: Any) -> Selection:
    """Evaluate several checkpoints and rank them by their weighted score.

    ``best_checkpoint_selection.json`` goes into their run, or the folder their runs share. Raises
    ConfigError when their perplexities are of different tokens, which cannot be ranked.
    """
    directories = list(dict.fromkeys(checkpoint.resolve(path).resolve() for path in paths))
    if others := [path for path in directories if is_recursive(path)]:
        raise ConfigError(
            f"{others[0]} holds a recursive model, which the weighted score is not made for. "
            "Evaluate its checkpoints one by one."
        )
    evaluations: list[Evaluation] = []
    for number, directory in enumerate(directories, 1):
        log.info("checkpoint %d of %d: %s", number, len(directories), directory)
        measured = evaluate(directory, **options)
        assert isinstance(measured, Evaluation)
        evaluations.append(measured)
        first, last = evaluations[0], evaluations[-1]
        if first.tokens_fingerprint != last.tokens_fingerprint:
            raise ConfigError(
                f"{first.checkpoint} was measured on {first.tokens} and {last.checkpoint} on "
                f"{last.tokens}: perplexities of different tokens cannot be ranked. Evaluate them "
                "one by one and compare their bits per byte."
            )
    evaluations.sort(key=lambda e: (-e.score["total"], e.figures["bits_per_byte"]))
    homes = [path.parent.parent if path.parent.name == "checkpoints" else path.parent
             for path in directories]  # fmt: skip
    home = Path(os.path.commonpath(homes))
    result = Selection(
        best=evaluations[0].checkpoint,
        ranking=[
            {
                "checkpoint": e.checkpoint,
                "step": e.step,
                "score": e.score["total"],
                "perplexity": e.figures["perplexity"],
                "bits_per_byte": e.figures["bits_per_byte"],
                "benchmark": e.benchmark["accuracy"] if e.benchmark else None,
                "tokens_per_second": e.speed["tokens_per_second"],
            }
            for e in evaluations
        ],
        evaluations=evaluations,
        notes=list(dict.fromkeys(note for e in evaluations for note in e.notes)),
        path=home / SELECTION,
    )
    artifacts.write_json(result.path, result.to_dict())
    return result


def is_recursive(directory: Path) -> bool:
    """Whether the answers of a checkpoint are to be evaluated, not its text: one that learned from
    plain text is a language model, however often its stack runs."""
    if interop.read_config(directory).schedule != "recursive":
        return False
    known = (directory / CONFIG_FILE).is_file()
    return not known or load_run(directory).objective.name == "act"


def all_checkpoints(run: str | Path) -> list[Path]:
    """Every whole checkpoint of a run, oldest first; DataError when it has none."""
    found = [path for _, path in checkpoint.steps(Path(run) / "checkpoints")]
    whole = []
    for path in found:
        if problems := checkpoint.problems(path):
            log.warning("%s is not usable and is passed over: %s", path, "; ".join(problems))
        else:
            whole.append(path)
    if not whole:
        what = f"{len(found)} damaged checkpoints and no whole one" if found else "no checkpoints"
        raise DataError(f"{run} has {what}; give a run's folder.")
    return whole


def open_checkpoint(
    directory: Path, split: str, tokens: str | Path | None, device: str
) -> tuple[Model, TokenSplit | PackedChunks, Config | None, list[str]]:
    """A checkpoint's model, held-out tokens and, where it is of a run of ours, configuration.

    Notes say what cannot be known of tokens that were named by hand.
    """
    config = load_run(directory) if (directory / CONFIG_FILE).is_file() else None
    notes: list[str] = []
    length = config.training.sequence_length if config else None
    if config and (tokens is None or students.is_val_path(config, tokens)):
        data = students.held_out(directory, config, split, notes)
    elif tokens is not None:
        data = students.open_rows(tokens, split, length, notes)
        notes.append(f"Whether {directory} was trained on text of {tokens} is not known here.")
    else:
        raise ConfigError(
            f"{directory} does not say which tokens it was trained on. Name held-out ones of its "
            f"tokenizer:\n  thimble tokens build CORPUS --tokenizer {directory}\n"
            f"  thimble evaluate {directory} --tokens data/tokens/..."
        )
    model = load(directory, device)
    check_tokenizer(data.manifest, model.tokenizer, directory)
    return model, data, config, notes


def _step(directory: Path) -> int | None:
    manifest = directory / artifacts.MANIFEST
    return artifacts.read_json(manifest)["options"].get("step") if manifest.is_file() else None


def _length(config: Config | None, model: Model, data: TokenSplit | PackedChunks) -> int:
    if isinstance(data, PackedChunks):
        return data.length
    return config.training.sequence_length if config else model.config.max_position_embeddings


def _far(
    model: Model,
    text: Text,
    found: students.Found | None,
    length: int,
    needles: bool,
    costs: bool,
    lengths: Sequence[int],
    notes: list[str],
) -> dict[str, Any]:
    """What is remembered over how far, and at what cost: ``needle`` and ``context``."""
    if not (needles or costs):
        return {"needle": None, "context": None}
    teacher = found.teacher if found else None
    loaded = teacher.loaded if isinstance(teacher, DirectTeacher) else None
    if found and loaded is None:
        notes.append(f"{found.name} answers over the network, so only the student's were measured.")
    models = reading.readers(model, loaded)
    hidden: dict[str, Any] | None = None
    taken: dict[str, Any] | None = None
    if needles:
        made = needle.make(text.tokens[:MOST_TEXT], model.tokenizer)
        chosen = lengths or needle.usual_lengths(made, length)
        hidden = needle.search(models, made, model.tokenizer, chosen)
    if costs:
        chosen = lengths or reading.doubling(512, max(8192, 4 * length))
        taken = context.measure(models, model.tokenizer.vocab_size, chosen)
    for what, measured in (("needles", hidden), ("costs", taken)):
        for name, each in (measured or {"models": {}})["models"].items():
            if each["too_long"]:
                longer = ", ".join(f"{n:,}" for n in each["too_long"])
                notes.append(f"No {what} of the {name} at {longer} tokens: it reads fewer.")
    return {"needle": hidden, "context": taken}


def _texts(
    model: Model, data: Text, config: Config | None
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    samples, real = held_out_samples(
        model,
        data,
        TEXTS,
        temperature=config.evaluation.temperature if config else 0.8,
        top_k=config.evaluation.top_k if config else 50,
        seed=config.seed if config else 1,
    )
    known = known_words(model, _training_text(model, data, config))
    prompts = [sample.prompt for sample in samples]
    generated = text_figures(model, prompts, [sample.text for sample in samples], known)
    shown = [dataclasses.asdict(sample) for sample in samples[:SHOWN]]
    return generated, text_figures(model, prompts, real, known), shown


def _training_text(model: Model, data: Text, config: Config | None) -> Text:
    if isinstance(data, PackedText):
        judged_elsewhere = config and students.is_val_path(config, data.directory)
        folder = config.data.folder if config and judged_elsewhere else data.directory
        chunks = PackedChunks(folder, "train", length=data.manifest["max_seq_length"])
        return PackedText(chunks, model.tokenizer, WORD_TOKENS)
    return TokenSplit(data.directory, "train")


def _benchmark(
    model: Model, data: TokenSplit | PackedChunks, notes: list[str]
) -> dict[str, Any] | None:
    if isinstance(data, PackedChunks):
        notes.append("No operating-system benchmark: it is made of a corpus, these are chunks.")
        return None
    try:
        made = domain.benchmark(data.directory)
    except DataError as error:
        notes.append(f"No operating-system benchmark: {error}")
        return None
    few = [f"{skill} {row['items']}" for skill, row in made["skills"].items()
           if row["items"] < domain.ITEMS]  # fmt: skip
    if few:
        notes.append(
            f"Fewer than {domain.ITEMS} held-out facts that the training text does not have: "
            f"{', '.join(few)}. A larger corpus (scale=full) has more."
        )
    return domain.score(model, made)


def weighted_score(
    perplexity: float, benchmark: float | None, mmlu: float | None, tokens_per_second: float
) -> dict[str, float]:
    """0.4 x 10/perplexity + 0.3 x benchmark + 0.2 x MMLU + 0.1 x speed/50, its parts and ``total``.

    The formula is the specification's. No part counts more than its weight: a perplexity below 10,
    or more than 50 tokens per second, which any small model makes, would else outweigh the rest.
    What was not measured counts 0.
    """
    parts = {
        "perplexity": min(FULL_PERPLEXITY / perplexity, 1.0),
        "os": benchmark or 0.0,
        "mmlu": mmlu or 0.0,
        "speed": min(tokens_per_second / FULL_SPEED, 1.0),
    }
    weighted = {name: WEIGHTS[name] * value for name, value in parts.items()}
    return {**weighted, "total": sum(weighted.values())}
