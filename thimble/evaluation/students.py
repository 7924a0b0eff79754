"""What is measured of a language model on held-out rows, and beside whom: its teacher."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thimble import artifacts
from thimble.config.schema import Config
from thimble.console import progress
from thimble.errors import DataError, EnvironmentProblem
from thimble.evaluation import agreement, perplexity
from thimble.evaluation.perplexity import BATCH_TOKENS, evaluate_split
from thimble.generation.model import Model
from thimble.models.retention import document_starts
from thimble.objectives.sparse_targets import SparseTargets, likeliest
from thimble.teachers import Asked, Examples, PackedExamples, Teacher, WindowExamples
from thimble.teachers.direct import DirectTeacher
from thimble.teachers.models import find, identity
from thimble.teachers.named import open_teacher
from thimble.tokens import packing
from thimble.tokens.packed import PackedChunks
from thimble.tokens.shards import TokenSplit
from thimble.training.data import open_data
from thimble.training.distillation import answering
from thimble.training.rows import evaluate_chunks

TEACHER_LOSS = "teacher_loss"
TOPK = 512  # tokens told apart of a teacher that no configuration asks
ABOUT = "teacher.json"
AT_ONCE = 64


# ------------------------------------------------------------------------------------- the rows


def open_rows(
    folder: str | Path, split: str, length: int | None, notes: list[str]
) -> TokenSplit | PackedChunks:
    """Held-out text: a split of a tokens folder, or of packed chunks of ``length``, which hold out
    one only."""
    if artifacts.kind(folder) != packing.KIND:
        return TokenSplit(folder, split)
    if split == "test":
        notes.append(f"{folder} holds out one split, val, and training looked at it, too.")
    return PackedChunks(folder, "val", length=length)


def held_out(
    directory: Path, config: Config, split: str, notes: list[str]
) -> TokenSplit | PackedChunks:
    """Held-out text of a checkpoint's run: a split of its tokens folder, or the packed chunks that
    training is judged by, of ``data.val_path`` where there is one.

    Raises DataError when the data it was trained on are missing, or were made again since.
    """
    manifest = artifacts.read_json(directory / artifacts.MANIFEST)
    if artifacts.kind(config.data.folder) != packing.KIND:
        return perplexity.held_out(directory, manifest, config, split)
    training = PackedChunks(config.data.folder, length=config.training.sequence_length)
    perplexity.check_trained_on(training, directory, manifest)
    data: PackedChunks = open_data(config, "val")
    if split == "test":
        notes.append(f"{data.directory} is what training was judged by; there is no other split.")
    return data


def is_val_path(config: Config, folder: str | Path) -> bool:
    """Whether this is the folder that training was judged by, beside the one it learned from."""
    paths = [config.data.val_path, config.data.path, folder]
    val, own, this = (None if path is None else Path(path).resolve() for path in paths)
    return this == val != own


def measure(
    model: Model, data: TokenSplit | PackedChunks, length: int, teacher: Teacher | None
) -> dict[str, Any]:
    """Figures as of ``perplexity.evaluate_split``, with accuracies, calibration and, with a
    ``teacher``, likeness to it, for all text and by category.

    Rows are cut as in training and documents kept apart as there. ``teacher_kl``: nats over its
    likeliest tokens and the rest; ``teacher_agreement``: how often both have the same likeliest
    token. Of packed chunks there are no categories, and ``bytes`` are those of the decoded targets.
    """
    apart = isinstance(data, PackedChunks)
    columns = agreement.names(teacher=teacher is not None)
    if isinstance(teacher, DirectTeacher):
        columns.append(TEACHER_LOSS)
    score = functools.partial(_scores, model, teacher, apart)
    rows = max(BATCH_TOKENS // length, 1)
    with progress(
        f"{data.split or 'val'} perplexity", len(data), "chunks" if apart else "tokens"
    ) as advance:
        if isinstance(data, PackedChunks):

            def counted(inputs: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
                advance(len(inputs))
                return score(inputs, targets, starts)

            figures = evaluate_chunks(counted, data, rows, None, model.device, columns)
            figures |= _sizes(data, model)
            figures["bits_per_byte"] = _bits_per_byte(figures["loss"], figures)
            figures["by_category"] = {}
        else:
            figures = evaluate_split(
                lambda inputs, targets: score(inputs, targets, None),
                data,
                length,
                rows,
                device=model.device,
                advance=advance,
                beside=columns,
            )
    for part in (figures, *figures["by_category"].values()):
        part["calibration_error"] = agreement.calibration_error(part)
        for name in agreement.BIN_NAMES:
            del part[name]
        if TEACHER_LOSS in part:
            part["teacher_perplexity"] = perplexity.perplexity(part[TEACHER_LOSS])
            part["teacher_bits_per_byte"] = _bits_per_byte(part[TEACHER_LOSS], part)
    return figures


@torch.inference_mode()
def _scores(
    model: Model,
    teacher: Teacher | None,
    apart: bool,
    inputs: Tensor,
    targets: Tensor,
    starts: Tensor | None,
) -> Tensor:
    if starts is None:
        begin = document_starts(model.config, inputs, model.tokenizer.eot_id)
    else:
        begin = starts
    hidden, head = model.network.hidden(inputs, starts_bt=begin), model.network.head.weight
    begin = starts if apart else None
    said: Any = None
    theirs = []
    if isinstance(teacher, DirectTeacher):
        said, losses = _said(teacher, inputs, begin, targets)
        theirs.append(losses[..., None])
    elif teacher is not None:
        said = teacher.targets(range(len(inputs)), inputs, begin)
    return torch.cat([agreement.position_scores(hidden, head, targets, said), *theirs], dim=-1)


def _said(
    teacher: DirectTeacher, inputs: Tensor, starts: Tensor | None, targets: Tensor
) -> tuple[SparseTargets, Tensor]:
    """What a loaded teacher says at temperature 1, and its own loss at each target: of the same
    logits, which are there a chunk of positions at a time."""
    loaded, wanted = teacher.loaded, targets.flatten()
    losses: list[Tensor] = []

    def finish(logits: Tensor) -> Tensor:
        logits = logits if loaded.finish is None else loaded.finish(logits)
        done = sum(map(len, losses))
        here = wanted[done : done + len(logits)]
        losses.append(F.cross_entropy(logits, here, reduction="none"))
        return logits

    hidden = loaded.hidden(inputs, starts)
    said = likeliest(hidden, loaded.head, teacher.asked.k, (1.0,), finish)
    return said, torch.cat(losses).view(targets.shape)


def _bits_per_byte(nats: float, figures: dict[str, Any]) -> float:
    return nats * figures["tokens"] / math.log(2) / max(figures["bytes"], 1)


def _sizes(chunks: PackedChunks, model: Model) -> dict[str, int]:
    """Bytes of the decoded targets, and documents that count, each once in however many chunks."""
    left_out = np.zeros(0, np.uint64) if chunks.exclude is None else chunks.exclude
    documents = np.setdiff1d(chunks.document_hashes(), left_out, assume_unique=True)
    size = 0
    for first in range(0, len(chunks), AT_ONCE):
        batch = chunks.rows(np.arange(first, min(first + AT_ONCE, len(chunks))))
        for targets in batch.targets:
            ids = targets[(targets >= 0) & (targets != chunks.eot_id)]
            size += len(model.tokenizer.decode(ids.tolist()).encode())
    return {"bytes": size, "documents": len(documents)}


# ---------------------------------------------------------------------------------- the teacher


@dataclass(frozen=True)
class Found:
    """A teacher and what it is called."""

    teacher: Teacher
    name: str


def find_teacher(
    directory: Path,
    config: Config | None,
    named: str | Path | None,
    data: TokenSplit | PackedChunks,
    length: int,
    device: torch.device,
    notes: list[str],
) -> Found | None:
    """The teacher ``named``, or the one the checkpoint at ``directory`` learned from.

    None where it learned from none, and with a note where its own cannot be asked: it is not there,
    is another one by now, or nobody says which it was. Raises what ``teachers`` raise for a named
    one that does not fit.
    """
    if named is not None:
        examples = _examples(data, length)
        k = config.teacher.topk if config is not None else TOPK
        precision = config.precision if config is not None else "auto"
        asked = Asked(min(k, examples.vocab_size))
        teacher = open_teacher(named, examples, asked, device=device, precision=precision)
        return Found(teacher, _name(teacher, str(named)))
    if config is None or config.objective.name != "distill":
        return None
    try:
        return _own(directory, config, _examples(data, length), device)
    except (DataError, EnvironmentProblem) as error:
        notes.append(f"Not held against its teacher: {str(error).splitlines()[0]}")
        return None


def _examples(data: TokenSplit | PackedChunks, length: int) -> Examples:
    if isinstance(data, PackedChunks):
        return PackedExamples(data.directory, data.split, length)
    return WindowExamples(data.directory, data.split, length)


def _own(directory: Path, config: Config, examples: Examples, device: torch.device) -> Found:
    options = config.teacher
    if options.mode != "served":
        if options.path is None:
            raise DataError(
                f"no teacher.path says whose words {options.cache} holds. Name it with --teacher."
            )
        about, folder = directory / ABOUT, find(options.path)
        adapter = None if options.adapter is None else Path(options.adapter)
        if about.is_file() and identity(folder, adapter) != artifacts.read_json(about)["identity"]:
            raise DataError(f"{folder} is not the one it learned from. Name one with --teacher.")
    asked = Asked(min(options.topk, examples.vocab_size))
    teacher = answering(config, examples, asked, device)
    return Found(teacher, _name(teacher, options.url or ""))


def _name(teacher: Teacher, given: str) -> str:
    return str(teacher.loaded.folder) if isinstance(teacher, DirectTeacher) else given
