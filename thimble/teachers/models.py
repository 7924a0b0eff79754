"""A causal language model of transformers as a teacher: found, checked, loaded, named.

Nothing is unpickled and no code of a repository is run. What a teacher is, is said by the sha256 of
its weights and of its adapter, not by a name that may mean something else tomorrow.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thimble import artifacts
from thimble.console import log, unlogged
from thimble.errors import DataError, EnvironmentProblem
from thimble.models.interop import PICKLED
from thimble.objectives.sparse_targets import Finish
from thimble.snapshot import fetch
from thimble.teachers.examples import Examples
from thimble.tokens.tokenizer import PROBE, Tokenizer, load_tokenizer
from thimble.training import checkpoint

# What a config.json says of the file, not of the model.
NOT_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache")
RAM_DISK = Path("/dev/shm")
RAM_PREFIX = "thimble-weights-"


@dataclass(frozen=True)
class LoadedModel:
    """``model`` in evaluation mode; ``decoder`` gives hidden states [B, L, D], ``head`` [V, D] the
    logits of them, after ``finish`` where there is one."""

    model: nn.Module
    decoder: nn.Module
    head: Tensor
    finish: Finish | None
    folder: Path

    @property
    def context(self) -> int | None:
        """The most positions it reads, where it says so."""
        return getattr(text_config(self.model), "max_position_embeddings", None)

    def hidden(self, inputs: Tensor, starts: Tensor | None = None) -> Tensor:
        """Final hidden states [B, L, D] of ``inputs`` [B, L]."""
        options = {}
        if starts is not None and bool(starts[:, 1:].any()):
            # Positions that begin anew tell transformers where a document does; those before it
            # are masked then.
            place = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
            begin = torch.where(starts, place, 0).cummax(dim=1).values
            options["position_ids"] = place - begin
        return self.decoder(input_ids=inputs, use_cache=False, **options).last_hidden_state

    def limited(self, vocab_size: int) -> LoadedModel:
        """The same as a distribution over the first ``vocab_size`` ids alone: padding of the head,
        and tokens only the teacher has, do not count."""
        if len(self.head) == vocab_size:
            return self
        finish = _finish(self.model, vocab_size)
        return replace(self, head=self.head[:vocab_size], finish=finish)


def find(name: str | Path) -> Path:
    """The folder of a model: a folder, a checkpoint or run of ours, the newest run with a
    checkpoint in the folder of a recipe's runs, or a name on the hub, fetched.

    Raises DataError when it is not there, EnvironmentProblem when the hub does not give it.
    """
    for run in sorted(Path(name).glob("*/checkpoints"), reverse=True):
        if any((run / pointer).is_file() for pointer in ("best", "latest")):
            return checkpoint.resolve(run.parent)
    if Path(name).exists():
        return checkpoint.resolve(name)
    if Path(name).parts[:-1] == ("runs",):
        raise DataError(
            f"There is no run in {name} to learn from. Train a teacher on the same data.path "
            f"first, or name one with teacher.path:\n  thimble train {Path(name).name} "
            "data.path=..."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith((".", "/")):
        raise DataError(f"There is no model at {name}, and it is not a name of the hub (who/what).")
    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    return fetch(str(name), "model", wanted)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder; a DataError where there are none, or only pickles."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = [n for n in (*PICKLED, "adapter_model.bin") if (folder / n).exists()]
        raise DataError(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when it is "
            "opened; thimble does not. Convert it to safetensors first."
            if pickled
            else f"{folder} holds no *.safetensors, so it is not a model that can be loaded."
        )
    return found


@functools.lru_cache(maxsize=8)
def weights_hash(folder: Path) -> str:
    """sha256 of what a model or adapter computes with: its safetensors and its configuration."""
    parts: list[Any] = [(file.name, artifacts.sha256_file(file)) for file in weight_files(folder)]
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            settings = artifacts.read_json(folder / name)
            kept = NOT_THE_MODEL if name == "config.json" else ("base_model_name_or_path",)
            parts.append({key: v for key, v in settings.items() if key not in kept})
    return artifacts.sha256_bytes(repr(parts).encode())


def identity(folder: Path, adapter: Path | None) -> dict[str, Any]:
    """Which teacher this is; equal ones compute the same."""
    return {
        "weights": weights_hash(folder),
        "adapter": None if adapter is None else weights_hash(adapter),
    }


def load(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    device: torch.device,
    dtype: torch.dtype,
    ram_disk: bool = False,
) -> LoadedModel:
    """Load a causal language model of transformers, with a PEFT adapter merged into it if given.

    Raises DataError for weights that are missing, pickled or do not fit their configuration, and
    for a model that would run code of its own or makes its logits in a way we do not know.
    """
    with unlogged():
        # The second makes the first import what it is made of, and that tells what it did not find.
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401

    folder = find(name)
    weight_files(folder)
    # An adapter is added to whole weights and rounded once.
    precision = torch.float32 if adapter is not None else dtype
    copied = in_memory(folder) if ram_disk else contextlib.nullcontext(folder)
    with copied as source, without_bars():
        try:
            found: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=precision,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # of any of a hundred classes of models
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"transformers cannot load a model from {folder}: {reason}") from error
    model, info = found
    absent = sorted(info["missing_keys"]) + sorted(map(str, info.get("mismatched_keys", ())))
    if absent:
        raise DataError(
            f"{folder} does not fit its config.json: it lacks {absent[0]} ({len(absent)} such "
            "tensors in all), which would be made up at random."
        )
    if adapter is not None:
        model = merged(model, Path(adapter))
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    loaded = LoadedModel(
        model,
        decoder=model.get_decoder(),
        head=model.get_output_embeddings().weight,
        finish=_finish(model),
        folder=folder,
    )
    check_logits(loaded)
    return loaded


def merged(model: Any, adapter: Path) -> Any:
    """The model with the adapter's change added to its weights."""
    peft = import_peft()
    if not (adapter / "adapter_config.json").is_file():
        raise DataError(
            f"There is no adapter at {adapter}: it has no adapter_config.json. `thimble teacher "
            "finetune` writes one as the folder `adapter`."
        )
    weight_files(adapter)
    try:
        return peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"The adapter {adapter} does not fit its model: {reason}") from error


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise EnvironmentProblem(
            "Adapters need PEFT. Install it with:\n  pip install 'thimble-lm[teacher]'"
        ) from error
    return peft


def text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _finish(model: Any, rows: int | None = None) -> Finish | None:
    """What transformers' models do to logits after the head: bias (Phi), scale (Cohere, Granite),
    cap (Gemma 2)."""
    config = text_config(model)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if bias is None and scale == 1.0 and cap is None:
        return None
    offset = None if bias is None else bias[:rows].float()

    def finish(logits: Tensor) -> Tensor:
        if offset is not None:
            logits = logits + offset
        logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return finish


@torch.no_grad()
def check_logits(loaded: LoadedModel) -> None:
    """Hidden states and head must give the model's own logits; of a few tokens both are small."""
    ids = torch.arange(8, device=loaded.head.device).remainder(len(loaded.head))[None]
    theirs = loaded.model(input_ids=ids, use_cache=False).logits.float()
    ours = (loaded.hidden(ids) @ loaded.head.t()).float()
    ours = ours if loaded.finish is None else loaded.finish(ours)
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
        kind = text_config(loaded.model).model_type
        raise DataError(
            f"{loaded.folder} ({kind}) makes its logits in a way thimble does not know, so it "
            "cannot be a teacher here. Serve it with vLLM instead."
        )


def check_vocabulary(folder: Path, examples: Examples) -> None:
    """Raise DataError unless the teacher's ids mean what those of the data mean.

    Which token ends a text is left to the data, and tokens that only the teacher has are allowed:
    base and instruction-tuned models of one family differ in these.
    """
    if not any((folder / n).is_file() for n in ("tokenizer.json", "vocab.json", "vocab.txt")) and (
        not list(folder.glob("*.model"))
    ):
        raise DataError(
            f"{folder} has no tokenizer, so nobody can tell whether its ids are those of "
            f"{examples.directory}. Put the tokenizer's files beside its weights."
        )
    problem = difference(load_tokenizer(folder), examples.tokenizer)
    if problem:
        raise DataError(
            f"The teacher {folder} has another vocabulary than {examples.directory}: {problem} "
            "Their ids mean different text. Tokenize the data with the teacher's tokenizer "
            f"(`--tokenizer {folder}`), or take a teacher with the vocabulary of the data."
        )


def difference(teacher: Tokenizer, data: Tokenizer) -> str:
    """How the vocabularies differ in what both must share; empty when they do not."""
    if teacher.fingerprint == data.fingerprint:
        return ""
    theirs, ours = teacher.vocabulary(), data.vocabulary()
    other = [token for token, index in ours.items() if theirs.get(token) != index]
    if other:
        first = other[0]
        return (
            f"{len(other):,} of {len(ours):,} tokens are not the same, such as {first!r}, which is "
            f"{ours[first]} in the data and {theirs.get(first, 'absent')} there."
        )
    if teacher.encode(PROBE) != data.encode(PROBE):
        return "they have the same tokens and cut text differently."
    return ""


def check_fits(loaded: LoadedModel, examples: Examples) -> None:
    """Raise DataError unless the model can read the rows and has a logit for every id."""
    if len(loaded.head) < examples.vocab_size:
        raise DataError(
            f"The teacher {loaded.folder} has {len(loaded.head):,} logits, {examples.directory} "
            f"has ids up to {examples.vocab_size - 1:,}."
        )
    if loaded.context is not None and examples.length > loaded.context:
        raise DataError(
            f"The teacher {loaded.folder} reads at most {loaded.context:,} tokens, the rows of "
            f"{examples.directory} have {examples.length:,}. Use shorter ones: "
            f"training.sequence_length={loaded.context}, of chunks also "
            f"`thimble tokens pack --max-seq-length {loaded.context}`."
        )


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """transformers shows no progress of its own meanwhile."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def in_memory(folder: Path) -> Iterator[Path]:
    """A copy of a model's files in /dev/shm for as long as it is loaded.

    What a process that died left there is removed first. Raises EnvironmentProblem where there is
    no such place, or too little of it.
    """
    if not RAM_DISK.is_dir():
        raise EnvironmentProblem(f"There is no {RAM_DISK} here. Leave out --ram-disk.")
    for leftover in RAM_DISK.glob(f"{RAM_PREFIX}*"):
        owner = leftover.name.removeprefix(RAM_PREFIX).split("-")[0]
        if not Path(f"/proc/{owner}").exists():
            shutil.rmtree(leftover, ignore_errors=True)
    files = [file for file in folder.iterdir() if file.is_file()]
    needed = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(RAM_DISK).free
    if needed > free:
        raise EnvironmentProblem(
            f"{RAM_DISK} has {free / 2**30:.1f} GiB free, the weights take {needed / 2**30:.1f}. "
            "Leave out --ram-disk."
        )
    copy = Path(tempfile.mkdtemp(prefix=f"{RAM_PREFIX}{os.getpid()}-", dir=RAM_DISK))
    try:
        for file in files:
            shutil.copyfile(file, copy / file.name)
        log.debug("%s: copied %d files to %s", folder, len(files), copy)
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)
