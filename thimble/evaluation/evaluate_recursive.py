"""A checkpoint of a recursive model measured: held-out answers, or puzzles, step by step.

Conversations are held against models that only count, and against what no honest model of free text
reaches; of ARC's test puzzles all augmentations of a task vote for two answers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thimble import artifacts
from thimble.config import load as configuration
from thimble.config.schema import Config
from thimble.console import progress
from thimble.errors import ConfigError, DataError
from thimble.evaluation.labels import label_baselines, suspicious
from thimble.evaluation.recursive import (
    check_kept,
    choose,
    empty_split,
    evaluate_conversations,
    evaluate_puzzles,
)
from thimble.evaluation.request import (
    Request,
    data_folder,
    fingerprint,
    fingerprint_of_run,
    read_object,
)
from thimble.models import interop
from thimble.models.recursive import RecursiveLM
from thimble.tokens.tokenizer import load_tokenizer
from thimble.training import devices
from thimble.training.distributed import Processes

if TYPE_CHECKING:
    from rich.console import Console

    from thimble.conversations.dataset import Conversations

REPORT, SUBMISSION = "evaluation_report.json", "submission.json"
SPLITS = ("train", "val", "test")
POSITIONS = {"cpu": 1 << 14, "cuda": 1 << 17}  # of a batch


@dataclass(frozen=True)
class RecursiveEvaluation:
    """``figures`` as in ``recursive``; ``baselines`` those of ``labels`` (conversations);
    ``arc``: pass@k of ARC. ``suspicious``: why the figures are not to be believed as they are."""

    checkpoint: Path
    recipe: str | None
    step: int | None
    parameters: int
    kind: str
    split: str
    data: Path
    data_fingerprint: str
    figures: dict[str, Any]
    baselines: dict[str, float] | None
    arc: dict[str, Any] | None
    suspicious: list[str]
    files: dict[str, Path]
    notes: list[str]
    created: str

    def to_dict(self) -> dict[str, Any]:
        return artifacts.plain(dataclasses.asdict(self))

    def render(self, console: Console) -> None:
        from thimble.evaluation.tables import render_recursive

        render_recursive(self, console)


def evaluate_recursive(
    directory: Path, *, split: str = "test", device: str = "auto", request: Request | None = None
) -> RecursiveEvaluation:
    """Measure a recursive checkpoint and write ``evaluation_report.json`` into it.

    Under torchrun each process evaluates its share of the examples, and the first one writes.
    Raises ConfigError or DataError for what does not fit: an empty split, other puzzles, another
    tokenizer, a key that is fixed by training.
    """
    request = request or Request()
    if split not in SPLITS:
        raise ConfigError(f"There is no split {split!r}; there are {', '.join(SPLITS)}.")
    check_kept(request.save_outputs)
    processes = Processes()
    where = devices.resolve_device(device)
    with processes.connected(where):
        task = _prepare(directory, split, where, request, processes)
        measured = _conversations(task) if task.kind == "conversations" else _puzzles(task)
        return _finish(task, measured)


@dataclass
class _Task:
    """What both kinds of data need: the model, its data's folder, and the question."""

    directory: Path
    trained: Config | None  # None: a checkpoint of another program
    folder: Path
    own_data: bool  # the very data that the run was trained on
    kind: str
    split: str
    network: RecursiveLM
    form: str
    request: Request
    processes: Processes
    notes: list[str]

    def output(self, name: str) -> Path:
        return Path(self.request.output_dir or self.directory) / name


@dataclass
class _Measured:
    figures: dict[str, Any]
    baselines: dict[str, float] | None = None
    arc: dict[str, Any] | None = None
    suspicious: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)


def _prepare(
    directory: Path, split: str, where: torch.device, request: Request, processes: Processes
) -> _Task:
    has_config = (directory / configuration.CONFIG_FILE).is_file()
    trained = configuration.load_run(directory) if has_config else None
    settings = request.settings()
    folder = data_folder(directory, trained, settings)
    kind = artifacts.kind(folder) or "puzzles"  # those of other programs have no manifest
    if kind not in ("conversations", "puzzles"):
        raise DataError(
            f"{folder} holds {kind}; a recursive model answers conversations or solves puzzles."
        )
    notes: list[str] = []
    network = _load(directory, where, settings.get("model.halt_max_steps"), notes)
    if where.type == "cuda" and trained:
        network.compute_dtype = devices.resolve_precision(trained.precision, where)
        notes.append(f"Computed in {str(network.compute_dtype).removeprefix('torch.')}.")
    form = (
        trained.objective.form
        if trained
        else read_object(directory / f"{kind.removesuffix('s')}.json").get("form", "softmax")
    )
    own_data = trained is not None and fingerprint(folder) == fingerprint_of_run(directory)
    return _Task(
        *(directory, trained, folder, own_data, kind, split),
        *(network, form, request, processes, notes),
    )


def _load(directory: Path, where: torch.device, steps: str | None, notes: list[str]) -> RecursiveLM:
    network = interop.load_model(directory, where)
    assert isinstance(network, RecursiveLM)
    if steps is not None:
        trained = network.config.halt_max_steps
        if not steps.isdecimal() or not int(steps):
            raise ConfigError(f"model.halt_max_steps={steps} is not a number of steps, 1 or more.")
        if int(steps) > 1 and not network.config.inject_input:
            raise ConfigError("This model has one supervision step: model.halt_max_steps=1.")
        network.config = network.config.model_copy(update={"halt_max_steps": int(steps)})
        notes.append(f"Run for {steps} supervision steps; trained with {trained}.")
    return network


# ------------------------------------------------------------------------------- the two kinds


def _conversations(task: _Task) -> _Measured:
    from thimble.conversations.dataset import Conversations

    data = Conversations(task.folder)
    if data.tokenizer().fingerprint != load_tokenizer(task.directory).fingerprint:
        raise DataError(
            f"{task.folder} was made with another tokenizer than {task.directory}: the model would "
            "read other words. Build it with the checkpoint's own, --tokenizer "
            f"{task.directory}."
        )
    numbers = data.split(task.split)
    if not len(numbers):
        raise DataError(empty_split(data, task.split))

    def measure(**options: Any) -> dict[str, Any]:
        return evaluate_conversations(task.network, data, task.split, form=task.form, **options)

    keep = ["examples", *task.request.save_outputs] if task.request.save_outputs else []
    figures, kept, limit = _run(task, measure, len(numbers), data.seq_len, keep)
    task.notes += [f"The data's own checks: {line}." for line in data.checks["suspicious"]]
    task.notes += _seen(task, data, choose(numbers, limit))
    return _Measured(
        figures,
        baselines=label_baselines(data, task.split) if task.processes.main else None,
        suspicious=suspicious(figures, task.kind, data.checks),
        files=_save(task, kept),
    )


def _puzzles(task: _Task) -> _Measured:
    from thimble.puzzles import arc, voting
    from thimble.puzzles.loader import Split

    if task.split == "val":
        raise ConfigError("Puzzles have no val split; there are train, test.")
    data = Split(task.folder, task.split)
    if not len(data):
        raise DataError(f"The {task.split} split of {task.folder} has no puzzles.")

    def measure(**options: Any) -> dict[str, Any]:
        return evaluate_puzzles(task.network, data, form=task.form, **options)

    votes = task.split == "test" and (task.folder / arc.TEST_PUZZLES).is_file()
    keep = ["examples", *task.request.save_outputs] if task.request.save_outputs else []
    wanted = [*keep, *(["examples", "preds", "q_halt_logits"] if votes else [])]
    figures, kept, _ = _run(task, measure, len(data), data.metadata.seq_len, wanted)
    if task.split == "train":
        task.notes.append("These are the puzzles it was trained on, and their augmentations.")
    measured = _Measured(figures, files=_save(task, kept))
    if votes and task.processes.main:
        halting = torch.sigmoid(kept["q_halt_logits"][:, -1]).numpy()
        tokens = kept["preds"].numpy().astype(np.uint8)
        predictions = voting.Predictions(kept["examples"].numpy(), tokens, halting)
        score = voting.score(task.folder, predictions)
        path = measured.files["submission"] = task.output(SUBMISSION)
        score.write_submission(path)
        measured.arc = score.to_dict()
    return measured


def _run(
    task: _Task,
    measure: Callable[..., dict[str, Any]],
    count: int,
    length: int,
    keep: Sequence[str],
) -> tuple[dict[str, Any], dict[str, torch.Tensor], int | None]:
    """The figures, what was kept (on the first process, of all of them), and how many examples at
    most were chosen."""
    request, device = task.request, task.network.embedding.weight.device
    batch_size = request.batch_size or max(1, POSITIONS.get(device.type, 1 << 15) // length)
    bounds = [request.subset_size, request.max_batches and request.max_batches * batch_size]
    limit = min((bound for bound in bounds if bound), default=None)
    total = min(count, limit or count)
    with progress(f"evaluate {task.split}", total / task.processes.count, "examples") as advance:
        figures = measure(
            max_examples=limit,
            batch_size=batch_size,
            advance=advance,
            keep=list(dict.fromkeys(keep)),
            processes=task.processes,
        )
    if math.isnan(figures["nll"]):
        raise DataError(
            f"The loss of {task.directory} on the {task.split} split is not a number: its weights "
            "are damaged. Evaluate an earlier checkpoint."
        )
    kept = figures.pop("kept", {})
    if keep and task.processes.count > 1:
        kept = _gathered(kept, task.processes)
    if total < count:
        task.notes.append(f"{total:,} of {count:,} examples, chosen by a hash: always the same.")
    if figures["halting"] == "fixed" and figures["steps"] > 1:
        where = f"after step {figures['halting_steps']:.0f}"
        if figures["halting_steps"] == figures["steps"]:
            where = "before the last step in no case"
        task.notes.append(
            f"Halting is fixed: whatever the example, the halting head stops {where}."
        )
    return figures, kept, limit


def _gathered(kept: dict[str, torch.Tensor], processes: Processes) -> dict[str, torch.Tensor]:
    """What all processes kept, in the order of the examples, on the first one; nothing elsewhere.
    All of them have to come here, also one that had no example."""
    parts: list[Any] | None = [None] * processes.count if processes.main else None
    torch.distributed.gather_object(kept, parts, dst=0, group=processes.control)
    if parts is None:
        return {}
    names = max(parts, key=len)  # one without any example has not kept all of them
    joined = {n: torch.cat([part[n] for part in parts if n in part]) for n in names}
    order = joined["examples"].argsort()
    return {name: value[order] for name, value in joined.items()}


def _seen(task: _Task, data: Conversations, numbers: np.ndarray) -> list[str]:
    """Whether what is evaluated was trained on, question by question."""
    from thimble.conversations.dataset import Conversations

    if task.own_data:
        trained_on = task.split == "train"
        return ["These are the conversations the model was trained on."] if trained_on else []
    unknown = [f"Whether the model was trained on what {task.folder} holds is not known here."]
    if task.trained is None or task.trained.data.path is None:
        return unknown
    try:
        own = Conversations(task.trained.data.path)
    except DataError:
        return unknown
    if own.manifest["fingerprint"] != fingerprint_of_run(task.directory):
        return unknown  # it was built again since
    questions = own.examples["text"][own.split("train")]
    seen = int(np.isin(data.examples["text"][numbers], questions).sum())
    if not seen:
        return []
    return [f"{seen:,} of these {len(numbers):,} questions are among those it was trained on."]


# -------------------------------------------------------------------------------- what is left


def _save(task: _Task, kept: dict[str, torch.Tensor]) -> dict[str, Path]:
    names = list(dict.fromkeys(["examples", *task.request.save_outputs]))
    if not task.request.save_outputs or not task.processes.main:
        return {}
    from safetensors.torch import save_file

    path = task.output(f"outputs-{task.split}.safetensors")
    with artifacts.atomic_file(path) as temporary:
        save_file({name: kept[name].contiguous() for name in names}, temporary)
    return {"outputs": path}


def _finish(task: _Task, measured: _Measured) -> RecursiveEvaluation:
    directory = task.directory
    result = RecursiveEvaluation(
        checkpoint=directory,
        recipe=task.trained.recipe if task.trained else None,
        step=read_object(directory / artifacts.MANIFEST).get("options", {}).get("step"),
        parameters=task.network.num_parameters(),
        kind=task.kind,
        split=task.split,
        data=task.folder,
        data_fingerprint=fingerprint(task.folder),
        figures=measured.figures,
        baselines=measured.baselines,
        arc=measured.arc,
        suspicious=measured.suspicious,
        files=measured.files,
        notes=task.notes,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    if task.processes.main:
        try:
            artifacts.write_json(directory / REPORT, result.to_dict())
        except OSError as error:  # what was measured in minutes is shown all the same
            task.notes.append(f"{directory / REPORT} could not be written: {error.strerror}.")
    return result
