"""thimble from Python: one function for each command, and the command calls nothing else.

Everything returns its result and prints nothing; notes and progress go to the logger ``thimble``.
Errors are those of ``thimble.errors``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble.api_data import (
    build_arc,
    build_conversations,
    build_corpus,
    build_maze,
    build_sudoku,
    build_tokens,
    cache_teacher,
    download_data,
    finetune_teacher,
    pack_tokens,
)
from thimble.console import log
from thimble.errors import ConfigError

if TYPE_CHECKING:
    from thimble.doctor import Diagnosis
    from thimble.evaluation.acceptance import Acceptance
    from thimble.evaluation.comparison import Comparison
    from thimble.evaluation.evaluate import Evaluation, Selection
    from thimble.evaluation.evaluate_recursive import RecursiveEvaluation
    from thimble.export.deployment import Export
    from thimble.generation import Model
    from thimble.quantization.ladder import Quantization
    from thimble.quickstart import Quickstart
    from thimble.report import Report
    from thimble.sweep import Sweep
    from thimble.training import Run
    from thimble.training.forecast import Forecast, Stages

__all__ = [
    "accept",
    "build_arc",
    "build_conversations",
    "build_corpus",
    "build_maze",
    "build_sudoku",
    "build_tokens",
    "cache_teacher",
    "chat",
    "compare",
    "doctor",
    "download_data",
    "evaluate",
    "explain",
    "export_bin",
    "export_gguf",
    "export_onnx",
    "export_transformers",
    "finetune_teacher",
    "generate",
    "inspect",
    "load",
    "pack_tokens",
    "plan",
    "quantize",
    "quickstart",
    "recipes",
    "report",
    "sweep",
    "train",
]

PathLike = str | Path


def plan(
    recipe: PathLike, *overrides: str, measure: bool = True, **nested: Any
) -> Forecast | Stages:
    """What a run would need and take, before it is started: tokens, memory, hours, cost.

    Names of more recipes before the overrides are stages that follow, each from the weights of the
    one before, and their sum is given; the overrides hold for all. ``measure``: take a few real
    steps on this machine, for its speed and its memory. Nothing is fetched for it: of
    conversations that are not here the number is taken from their documents.
    """
    from thimble.config.load import load as load_config
    from thimble.config.load import recipe_names

    more = list(itertools.takewhile(recipe_names().__contains__, overrides))
    rest = overrides[len(more) :]
    configs = [load_config(name, rest, nested) for name in (recipe, *more)]
    # What is heavy comes after the check of what was typed.
    from thimble.training.data import ready
    from thimble.training.forecast import Stages, forecast
    from thimble.training.plan import is_away

    found = [forecast(each if is_away(each) else ready(each), measure=measure) for each in configs]
    return Stages(found) if more else found[0]


def train(
    recipe: PathLike | None = None,
    *overrides: str,
    resume: PathLike | None = None,
    retry: int = 0,
    on_success: str | None = None,
    on_failure: str | None = None,
    **nested: Any,
) -> Run:
    """Train a recipe and return the run.

    ``overrides`` are ``"key=value"``, ``nested`` gives values as objects:
    ``train("slm_nano", optim={"learning_rate": 1e-3})``. ``resume`` is a run or a checkpoint to go
    on from, whose saved configuration then counts (with the overrides), or ``"auto"``: the newest
    run of the recipe. What the plan warns of is logged before the first step. ``retry``: how often
    a run that a guard stopped is mended and goes on. ``on_success`` and ``on_failure`` are commands
    for the shell, called at the end with THIMBLE_RUN, THIMBLE_STATUS and THIMBLE_REASON.
    """
    from thimble.config.load import load as load_config

    if recipe is None and resume in (None, "auto"):
        raise ConfigError(
            "Which recipe? For example:\n  thimble train slm_nano\nAll recipes: thimble recipes"
        )
    config = None if recipe is None else load_config(recipe, overrides, nested)
    # What is heavy comes after the check of what was typed.
    from thimble.config.schema import DataConfig
    from thimble.training import data, train_with_retries
    from thimble.training import plan as planning
    from thimble.training.hooks import told
    from thimble.training.run import RunFolder

    if resume is None:
        assert config is not None
        config = data.ready(config)
        for warning in planning.plan(config).warnings:
            log.warning("%s", warning)
    else:
        run = (
            RunFolder.to_resume(config, resume).path
            if config
            else RunFolder.containing(resume).path
        )
        saved = load_config(run, overrides, nested)
        if config is not None and config.recipe != saved.recipe:
            raise ConfigError(
                f"{run} is a run of {saved.recipe}, not of {config.recipe}. Resume it with:\n"
                f"  thimble train {saved.recipe} --resume {resume}"
            )
        if any(re.match(r"[-+]*dataset\b", key) for key in (*overrides, *nested)):
            saved = saved.model_copy(update={"data": DataConfig()})  # it may be others now
        config, resume = data.ready(saved), run if resume == "auto" else resume
    with told(on_success, on_failure) as runs:
        runs.append(train_with_retries(config, retry, resume))
    return runs[0]


def sweep(
    recipe: PathLike | None = None,
    *overrides: str,
    resume: PathLike | None = None,
    **nested: Any,
) -> Sweep:
    """Train a recipe once for each combination of values, and say which one is best.

    A key has several values as Hydra writes them: ``"optim.learning_rate=1e-3,3e-3"``,
    ``range(...)``, ``choice(...)``; ``hydra/launcher=...`` and ``hydra/sweeper=...`` choose its
    plugins. Every value is checked before the first run. A run that fails is recorded and does not
    end the others; only when none finished SweepFailed is raised. Interrupted leaves all runs to
    ``resume``, which is the folder of a sweep.
    """
    if (recipe is None) == (resume is None) or (resume is not None and (overrides or nested)):
        raise ConfigError(
            "Give a recipe and what to sweep, or a sweep to go on with. For example:\n"
            "  thimble sweep slm_nano optim.learning_rate=1e-3,3e-3\n"
            "  thimble sweep --resume runs/sweeps/slm_nano/<time>-<slug>"
        )
    from thimble.sweep import sweep as run_all

    return run_all(recipe, overrides, nested, resume)


def compare(
    recipe: PathLike | None = None,
    *overrides: str,
    run: PathLike | None = None,
    retry: int = 0,
    subset_size: int | None = None,
    **nested: Any,
) -> Comparison:
    """Train a recursive recipe and plain models beside it; one table of the test split.

    The plain ones have the recursive model's computation, and its parameters, and as many updates.
    ``run``: a recursive run in place of a recipe, finished or not; only what is missing is trained.
    ``retry`` as in ``train``, ``subset_size`` as in ``evaluate``. The result is kept as
    ``comparison.json`` in the recursive run, where ``report`` finds it.
    """
    if (recipe is None) == (run is None) or (run is not None and (overrides or nested)):
        raise ConfigError(
            "Give a recursive recipe, or a run to compare or to go on with. For example:\n"
            "  thimble compare instruct_os\n  thimble compare --run runs/instruct_os/<time>-<slug>"
        )
    from thimble.config.load import load as load_config

    if recipe is not None:
        load_config(recipe, overrides, nested)
    # What is heavy comes after the check of what was typed.
    from thimble.compare import compare as run_all

    return run_all(recipe, overrides, nested, run=run, retry=retry, subset_size=subset_size)


def load(path: PathLike, device: str = "auto", *, seq_len: int | None = None) -> Model:
    """A trained model from a checkpoint, or from a run (its best checkpoint).

    ``seq_len``: longest conversation, in place of the one in training.
    """
    from thimble import generation

    return generation.load(Path(path), device, seq_len=seq_len)


def accept(path: PathLike, *, split: str = "val", device: str = "auto") -> Acceptance:
    """Whether a checkpoint passes the gate of its recipe; writes ``acceptance.json``."""
    from thimble.evaluation.acceptance import accept as judge

    return judge(Path(path), split=split, device=device)


def evaluate(
    *paths: PathLike,
    every: bool = False,
    split: str = "test",
    tokens: PathLike | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    device: str = "auto",
    **recursive: Any,
) -> Evaluation | RecursiveEvaluation | Selection:
    """Measure a checkpoint on held-out text, by category, its generation, speed and benchmark.

    One path gives an ``Evaluation``, kept as ``evaluation_report.json`` in the checkpoint. Several,
    or a run with ``every`` (all its checkpoints), give a ``Selection``: the ranking by weighted
    score, kept as ``best_checkpoint_selection.json``. ``tokens``: held-out text for a checkpoint
    that is not of a run of ours. ``tasks``: of lm-evaluation-harness, ``limit`` items of each.

    A recursive model gives a ``RecursiveEvaluation``: its answers after each supervision step.
    ``recursive``: ``subset_size``, ``save_outputs``, ``overrides`` and the other fields of
    ``thimble.evaluation.request.Request``; ``split`` may be ``train``, too.
    """
    from thimble.evaluation.evaluate import all_checkpoints, select
    from thimble.evaluation.evaluate import evaluate as measure

    chosen = [path for run in paths for path in (all_checkpoints(run) if every else [run])]
    if not chosen:
        raise ConfigError("Which checkpoint? For example:\n  thimble evaluate runs/slm_nano/...")
    options: dict[str, Any] = {"split": split, "tokens": tokens, "tasks": tasks, "limit": limit}
    options |= recursive
    several = every or len(chosen) > 1
    return (
        select(chosen, device=device, **options)
        if several
        else measure(chosen[0], device=device, **options)
    )


def quantize(
    path: PathLike,
    *,
    bits: int = 4,
    output: PathLike | None = None,
    calibration_samples: int = 512,
    device: str = "auto",
) -> Quantization:
    """Write a checkpoint with weights of ``bits`` (4 or 8), or of more where its gate fails.

    GPTQ, calibrated on windows of the validation split; the gate is judged on the test split.
    """
    from thimble.quantization import ladder

    return ladder.quantize(
        path, bits=bits, output=output, calibration_samples=calibration_samples, device=device
    )


# Of a configuration's keys those that mean something when a model answers.
GENERATION_KEYS = ("dataset.seq_len", "dataset.system_message")


def generate(
    path: PathLike,
    *,
    prompt: str | None = None,
    message: str | None = None,
    system_message: str | None = None,
    device: str = "auto",
    overrides: Mapping[str, str] | None = None,
    **options: Any,
) -> str:
    """Continue a prompt, or answer a message.

    ``options``: ``max_tokens``, ``temperature``, ``top_k``, ``top_p``, ``seed``, ``steps``,
    ``stream``, ``watch``, as in ``thimble.generation.model.Options``. ``overrides``:
    ``dataset.seq_len``, for longer conversations than in training, ``dataset.system_message``.
    """
    if (prompt is None) == (message is None):
        raise ConfigError("Give either --prompt (to be continued) or --message (to be answered).")
    given = dict(overrides or {})
    length = given.get("dataset.seq_len")
    if length is not None and not (length.isdecimal() and int(length)):
        raise ConfigError(f"dataset.seq_len={length} is not a number of tokens, 1 or more.")
    model = load(path, device, seq_len=int(length) if length else None)
    if system_message is None:
        system_message = given.get("dataset.system_message")
    return model.generate(prompt, message, system_message=system_message, **options)


def chat(
    path: PathLike,
    messages: Iterable[str],
    *,
    device: str = "auto",
    stream: Callable[[str], object] | None = None,
    **options: Any,
) -> list[dict[str, str]]:
    """Answer one message after the other; returns the conversation as roles and contents.

    ``messages`` may be a generator that asks a person: the next message is taken when the last one
    has been answered. ``stream``, ``system_message`` and ``options`` as in ``generate``; an answer
    ends with "\n".
    """
    model = load(path, device)
    conversation: list[dict[str, str]] = []
    for message in messages:
        conversation.append({"role": "user", "content": message})
        answer = model.chat(conversation, stream=stream, **options)
        conversation.append({"role": "assistant", "content": answer})
        if stream:
            stream("\n")
    return conversation


def export_gguf(
    path: PathLike,
    *,
    type: str = "F16",
    output: PathLike | None = None,
    tokens: PathLike | None = None,
) -> Export:
    """Write a checkpoint as one GGUF file for llama.cpp, checked there where it is installed.

    Types: F16, F32, Q8_0 and, with llama-cpp-python, Q4_K_M, Q4_K_S, Q5_K_M, Q5_K_S, Q6_K.
    ``tokens``: held-out text for a checkpoint that is not of a run of ours.
    """
    from thimble.export import gguf

    return gguf.export(path, type=type, output=output, tokens=tokens)


def export_onnx(
    path: PathLike,
    *,
    output: PathLike | None = None,
    tokens: PathLike | None = None,
    cache: bool = False,
) -> Export:
    """Write a checkpoint as an ONNX graph, checked with onnxruntime.

    ``cache``: the graph also takes and gives the keys and values of the positions before.
    """
    from thimble.export import onnx

    return onnx.export(path, output=output, tokens=tokens, cache=cache)


def export_transformers(path: PathLike, output: PathLike, *, dtype: str | None = None) -> Path:
    """Write what ``from_pretrained`` reads of a checkpoint, and no more, into a new folder."""
    from thimble.export import transformers

    return transformers.export(path, output, dtype=dtype)


def export_bin(path: PathLike, output: PathLike, *, dtype: str | None = None) -> Path:
    """The same with the weights as ``pytorch_model.bin``, for programs that want that name."""
    from thimble.export import transformers

    return transformers.export(path, output, dtype=dtype, pickled=True)


def inspect(path: PathLike) -> dict[str, Any]:
    """What an artefact of ours is: kind, counts, options, inputs, and whether it is whole."""
    from thimble.inspection import inspect as look

    return look(Path(path))


def report(path: PathLike) -> Report:
    """One self-contained HTML page about a run, and its plots as PNG, written into the run."""
    from thimble.report import report as write

    return write(path)


def doctor() -> Diagnosis:
    """What this machine has (versions, devices, memory, disk, network, extras), what is amiss."""
    from thimble.doctor import diagnose

    return diagnose()


def quickstart(*overrides: str) -> Quickstart:
    """Text, tokens, ``slm_nano``, the gate and a sample; what is done already is not done again."""
    from thimble.quickstart import quickstart as run

    return run(*overrides)


def recipes() -> list[dict[str, Any]]:
    """Every recipe with its size, context, steps and gate."""
    from thimble.config.load import load as load_config
    from thimble.config.load import recipe_names, recipe_summary

    rows = []
    for name in recipe_names():
        config = load_config(name)
        rows.append(
            {
                "recipe": name,
                "parameters": config.model.num_parameters,
                "vocabulary": config.model.vocab_size,
                "context": config.training.sequence_length,
                "steps": config.training.max_steps,
                "perplexity below": config.acceptance.perplexity,
                "what": recipe_summary(name),
            }
        )
    return rows


def explain(key: str | None = None) -> list[dict[str, Any]]:
    """The keys of a configuration (all, one group, or one) with type, default, range, meaning."""
    from thimble.config.describe import as_override, describe_range, describe_type, keys
    from thimble.config.load import check_key

    chosen = [name for name in keys() if key in (None, name) or name.startswith(f"{key}.")]
    if not chosen:
        check_key(str(key), "VALUE")
    rows = []
    for name in chosen:
        field = keys()[name]
        default = None if field.is_required() else as_override(field.get_default())
        rows.append(
            {
                "key": name,
                "default": default,
                "type": describe_type(field),
                "range": describe_range(field),
                "meaning": field.description,
            }
        )
    return rows
