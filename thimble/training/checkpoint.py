"""Checkpoints: Hugging Face directories that also hold all it takes to go on bit for bit.

Written beside, fsynced and renamed, with a manifest of sha256; one that is incomplete or damaged is
recognised by it and passed over for the newest valid one.
"""

from __future__ import annotations

import pickle
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thimble import artifacts
from thimble.config import load as configuration
from thimble.config.describe import as_override
from thimble.config.model import ModelConfig
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import DataError
from thimble.models import interop
from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM
from thimble.training import sharding

if TYPE_CHECKING:
    from thimble.tokens.tokenizer import Tokenizer

KIND = "checkpoint"
MAKE = "thimble train RECIPE"
PUZZLES = "puzzle_embedding.weight"
STEP = re.compile(r"step-(\d+)$")


@dataclass
class TrainerState:
    """What a checkpoint knows beside tensors; all of it goes into ``trainer_state.json``."""

    step: int = 0  # updates done
    windows: int = 0  # windows or other examples given out: the place in the data
    tokens: int = 0
    seconds: float = 0.0  # spent training, over all resumes
    best_step: int | None = None
    best_perplexity: float | None = None
    # The record being collected when the checkpoint was written, and the guards' memory.
    pending_loss: float = 0.0
    pending_steps: int = 0
    lowest_loss: float | None = None
    lowest_step: int = 0
    smoothed_loss: float | None = None
    saddle: dict[str, Any] | None = None


def save(
    directory: Path,
    model: CausalLM | RecursiveLM,
    optimizer: dict[str, Any],
    scaler: torch.amp.GradScaler,
    tokenizer: Tokenizer | None,
    state: TrainerState,
    config: Config,
    cursor: dict[str, Any],
    *,
    tensors: dict[str, dict[str, torch.Tensor]],
    documents: dict[str, Any],
) -> None:
    """Write a complete checkpoint under ``directory``; on any failure nothing has that name.

    ``model`` and ``optimizer``, a state dict, are whole, also where training has them in shards.
    ``tensors``: what else it takes to go on, as ``<name>.safetensors`` (``tensors`` reads them);
    ``documents``: JSON files by their names.
    Raises EnvironmentProblem when the disk is full.
    """
    from safetensors.torch import save_file

    with artifacts.atomic_directory(directory) as temporary:
        save_model(temporary, model, tokenizer)
        torch.save(optimizer, temporary / "optimizer.pt")
        scheduler = {"last_step": state.step, "max_steps": config.training.max_steps}
        torch.save(scheduler | {"scaler": scaler.state_dict()}, temporary / "scheduler.pt")
        torch.save(random_state(), temporary / "rng.pt")
        for name, content in tensors.items():
            if content:
                whole = {key: value.detach().cpu().contiguous() for key, value in content.items()}
                save_file(whole, temporary / f"{name}.safetensors")
        for name, document in documents.items():
            artifacts.write_json(temporary / name, document)
        artifacts.write_json(temporary / "trainer_state.json", vars(state))
        artifacts.write_json(temporary / "data_cursor.json", cursor)
        configuration.save(config, temporary / configuration.CONFIG_FILE)
        artifacts.write_manifest(
            temporary,
            KIND,
            inputs={"tokens": cursor["tokens"], "path": config.data.path},
            options={"recipe": config.recipe, "step": state.step},
            counts={"parameters": model.num_parameters(), "tokens_seen": state.tokens},
            packages=("torch", "transformers", "tokenizers", "safetensors"),
        )


def save_model(directory: Path, model: CausalLM | RecursiveLM, tokenizer: Tokenizer | None) -> None:
    """The part transformers reads: configuration, weights and, where it has to do with text,
    tokenizer."""
    from safetensors.torch import save_file

    tensors = interop.to_native_tensors(model)
    cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(cpu, directory / interop.WEIGHTS, metadata={"format": "pt"})
    special: dict[str, int | None] = dict.fromkeys(("bos", "eos", "pad"))
    if tokenizer is not None:
        special = {"bos": tokenizer.eot_id, "eos": tokenizer.eot_id, "pad": tokenizer.pad_id}
    native = interop.to_native_config(model.config, special)
    artifacts.write_json(directory / "config.json", native)
    if tokenizer is None:
        return
    generation = {
        "bos_token_id": tokenizer.eot_id,
        "eos_token_id": tokenizer.eot_id,
        "pad_token_id": tokenizer.eot_id if tokenizer.pad_id is None else tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
    }
    artifacts.write_json(directory / "generation_config.json", generation)
    tokenizer.save(directory)


def random_state() -> dict[str, Any]:
    """States of every generator a run could draw from, as tensors and plain numbers."""
    version, inner, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(inner), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "position": numpy["state"]["pos"],
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    numpy = state["numpy"]
    key, position = numpy["key"].numpy().astype(np.uint32), numpy["position"]
    np.random.set_state(("MT19937", key, position, numpy["has_gauss"], numpy["gauss"]))
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


def tensors(directory: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors that ``save`` kept under this name; none where there were none."""
    from safetensors.torch import load_file

    path = directory / f"{name}.safetensors"
    return load_file(path) if path.is_file() else {}


def begin_with(model: CausalLM | RecursiveLM, path: str) -> None:
    """Take the weights of another run's checkpoint; its optimizer and place stay behind.

    Of a model with embeddings of other puzzles all else is taken: an identifier says nothing among
    other puzzles, so each begins as the mean of the old ones, as in TRM. Raises DataError for any
    other difference.
    """
    directory, wanted = resolve(path), model.config
    found = interop.read_config(directory)
    before, now = found.puzzle_identifiers, wanted.puzzle_identifiers
    other_puzzles = before != now and before > 0 and now > 0
    if other_puzzles:
        found = found.model_copy(update={"puzzle_identifiers": now})
    if found != wanted:
        raise DataError(
            f"{directory} holds another model than the one configured, so it cannot begin with "
            f"its weights. Use the model keys it was trained with:\n  {keys_of(found, wanted)}"
        )
    tensors = interop.read_tensors(directory)
    if other_puzzles:
        tensors[PUZZLES] = tensors[PUZZLES].mean(0, keepdim=True).repeat(now, 1)
    interop.load_native_tensors(model, tensors, directory)
    log.info("beginning with the weights of %s", directory)
    if other_puzzles:
        counts = f"{before:,}", f"{now:,}"
        log.info("it had learned %s puzzles, these are %s: each begins as their mean", *counts)


def keys_of(found: ModelConfig, wanted: ModelConfig) -> str:
    """The keys in which a model differs from another one, as one would give them."""
    theirs, ours = found.model_dump(), wanted.model_dump()
    return " ".join(f"model.{k}={as_override(v)}" for k, v in theirs.items() if ours[k] != v)


def restore(
    directory: Path,
    model: CausalLM | RecursiveLM,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[TrainerState, dict[str, Any]]:
    """Load everything of a checkpoint into the given objects; returns its state and data cursor.

    The optimizer's rates and decays stay those of the configuration at hand: one given on resume is
    the one used.
    """
    found = interop.read_config(directory)
    if found != model.config:
        raise DataError(
            f"{directory} holds another model than the one configured. Resume with the model keys "
            f"it was trained with:\n  {keys_of(found, model.config)}"
        )
    full = interop.new_model(model.config) if sharding.is_sharded(model) else model
    interop.load_native_tensors(full, interop.read_tensors(directory), directory)
    if full is not model:
        sharding.scatter_weights(full, model)
    wanted = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    saved = unpickle_safely(directory / "optimizer.pt")
    if [group["names"] for group in saved["param_groups"]] != [group["names"] for group in wanted]:
        raise DataError(f"{directory / 'optimizer.pt'} belongs to other parameters.")
    sharding.scatter_state(saved, optimizer)
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, wanted, strict=True):
        group.update(settings)
    scaler_state = unpickle_safely(directory / "scheduler.pt")["scaler"]
    if scaler.is_enabled() and scaler_state:
        scaler.load_state_dict(scaler_state)
    restore_random_state(unpickle_safely(directory / "rng.pt"))
    state = TrainerState(**artifacts.read_json(directory / "trainer_state.json"))
    return state, artifacts.read_json(directory / "data_cursor.json")


def unpickle_safely(path: Path) -> Any:
    """A torch file as tensors and plain values only (``weights_only``): it cannot run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged or not a plain torch file: {reason}") from error


def steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, directory) of all checkpoints of a run, oldest first."""
    found = [(STEP.match(path.name), path) for path in checkpoints.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def problems(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty when its manifest's sha256s all agree."""
    try:
        manifest = artifacts.read_manifest(directory, KIND, make=MAKE)
    except DataError as error:
        return [str(error).splitlines()[0]]
    return artifacts.damaged_files(directory, manifest, hashes=True)


def newest_valid(checkpoints: Path) -> Path:
    """The newest complete checkpoint; damaged ones are passed over with a message.

    Raises DataError when there is none.
    """
    for leftover in checkpoints.glob(f"{artifacts.TEMPORARY}step-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # a save that was killed; the run is locked
    seen = 0
    for _, directory in reversed(steps(checkpoints)):
        found = problems(directory)
        if not found:
            return directory
        seen += 1
        log.warning("%s is not usable and is passed over: %s", directory, "; ".join(found))
    raise DataError(
        f"{checkpoints} holds no usable checkpoint ({seen} damaged). Start the run again."
    )


def prune(checkpoints: Path, keep_last: int, keep: set[str]) -> list[Path]:
    """Remove all but the newest ``keep_last`` checkpoints and those named in ``keep``."""
    removed = [path for _, path in steps(checkpoints)[:-keep_last] if path.name not in keep]
    for path in removed:
        aside = path.with_name(f"{artifacts.TEMPORARY}{path.name}-removed")
        path.rename(aside)  # never a half-removed folder under a checkpoint's name
        shutil.rmtree(aside, ignore_errors=True)
    return removed


def resolve(path: str | Path) -> Path:
    """The checkpoint directory meant by a checkpoint, a run folder or its checkpoints folder.

    A run folder stands for its best checkpoint, or the latest where none has been evaluated.
    """
    path = Path(path)
    for folder in (path / "checkpoints", path):
        for pointer in ("best", "latest"):
            file = folder / pointer
            if file.is_file():
                target = folder / file.read_text(encoding="utf-8").strip()
                if target.parent == folder and target.is_dir():
                    return target
    if not path.exists():
        raise DataError(f"There is no checkpoint or run at {path}.")
    return path
