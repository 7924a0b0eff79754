"""What every export for another program has in common: a source, a target, checks, a manifest.

The manifest ``<file>.json`` says what is in the file, where its weights come from, how far it was
checked and what it measured; file and manifest appear together or not at all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thimble import artifacts
from thimble.config.load import CONFIG_FILE, load_run
from thimble.config.model import RECURSIVE_KEYS
from thimble.errors import DataError, EnvironmentProblem
from thimble.evaluation import perplexity
from thimble.tokens.shards import TokenSplit, check_tokenizer
from thimble.training import checkpoint

if TYPE_CHECKING:
    from thimble.config.schema import Config, ModelConfig
    from thimble.tokens.tokenizer import Tokenizer

SPLIT = "test"
LONGEST_WINDOW = 2048  # for a checkpoint that does not say how long its training windows were


@dataclass(frozen=True)
class Source:
    """A checkpoint to export; ``config`` is the run's, None for one of transformers."""

    checkpoint: Path
    name: str
    home: Path  # where exports go unless told otherwise
    config: Config | None
    manifest: dict[str, Any]

    def weights(self) -> dict[str, str]:
        """Name -> sha256 of the files of weights."""
        files = sorted(self.checkpoint.glob("*.safetensors"))
        return {file.name: artifacts.sha256_file(file) for file in files}


@dataclass(frozen=True)
class Export:
    """A written file; ``facts`` is what its manifest says."""

    path: Path
    manifest: Path
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        shown = {key: self.facts[key] for key in ("type", "file", "checks", "speed", "warnings")}
        return {"path": self.path, "manifest": self.manifest, **shown}


def find_source(path: str | Path) -> Source:
    """The checkpoint meant by a run or a checkpoint folder, ours or transformers'.

    Raises DataError when it does not exist, or when files of it are not those of its manifest.
    """
    directory = checkpoint.resolve(path)
    manifest: dict[str, Any] = {}
    if (directory / artifacts.MANIFEST).is_file():
        manifest = artifacts.read_manifest(directory, checkpoint.KIND, make=checkpoint.MAKE)
        if found := artifacts.damaged_files(directory, manifest, hashes=True):
            raise DataError(f"{directory} is damaged: {'; '.join(found)}. Export another one.")
    config = load_run(directory) if manifest and (directory / CONFIG_FILE).is_file() else None
    absolute = directory.resolve()
    run = absolute.parent.parent
    if config and absolute.parent.name == "checkpoints" and (run / CONFIG_FILE).is_file():
        return Source(
            directory, config.recipe, directory.parent.parent / "export", config, manifest
        )
    return Source(
        directory, config.recipe if config else absolute.name, absolute.parent, config, manifest
    )


def held_out(source: Source, tokens: str | Path | None, tokenizer: Tokenizer) -> TokenSplit | str:
    """The test split to check an export with, or why there is none.

    ``tokens`` is a tokens folder to use in place of the one the checkpoint was trained on. Raises
    DataError when that folder was made with another tokenizer.
    """
    if tokens is not None:
        split = TokenSplit(tokens, SPLIT)
        check_tokenizer(split.manifest, tokenizer, source.checkpoint)
    elif source.config is None:
        return "the checkpoint names no held-out tokens; give some with --tokens FOLDER"
    else:
        try:
            split = perplexity.held_out(source.checkpoint, source.manifest, source.config, SPLIT)
        except DataError as error:
            return f"there are no held-out tokens ({error}); give some with --tokens FOLDER"
    if len(split) == 0:
        return f"the {SPLIT} split of {split.directory} is empty; give another with --tokens FOLDER"
    return split


def window_length(source: Source, config: ModelConfig) -> int:
    """How long the windows of an evaluation are: as in training."""
    if source.config is not None:
        return source.config.training.sequence_length
    return min(config.max_position_embeddings, LONGEST_WINDOW)


def windows(split: TokenSplit, length: int, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets, int64 [T] each, of evenly spread windows: ``tokens`` or a few more.

    They are cut as in ``thimble.evaluation.perplexity``: the first target of a window is predicted
    from the token before it, which at the beginning of the stream is end-of-text.
    """
    whole, wanted = len(split) // length, -(-tokens // length)
    available = whole if whole >= wanted else -(-len(split) // length)  # the last may be shorter
    chosen = np.linspace(0, available - 1, min(available, wanted)).astype(np.int64)
    for start in np.unique(chosen) * length:
        targets = split.tokens[start : start + length].astype(np.int64)
        before = split.tokens[start - 1] if start else split.eot_id
        yield np.concatenate([[np.int64(before)], targets[:-1]]), targets


def choose_target(source: Source, output: str | Path | None, ending: str) -> Path:
    """Where the file will be; DataError when something is there already."""
    target = Path(output) if output else source.home / f"{source.name}{ending}"
    for path in (target, manifest_path(target)):
        if path.exists() or path.is_symlink():
            raise DataError(f"{path} exists already. Remove it, or choose another file with -o.")
    return target


def manifest_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


@contextlib.contextmanager
def file_and_manifest(target: Path) -> Iterator[tuple[Path, Path]]:
    """Yield temporary paths for a file and its manifest; both get their names, or neither."""
    made = not target.parent.exists()
    try:
        with (
            artifacts.atomic_file(manifest_path(target)) as manifest,
            artifacts.atomic_file(target) as file,
        ):
            yield file, manifest
    except BaseException:
        target.unlink(missing_ok=True)  # choose_target has seen that there was nothing
        manifest_path(target).unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                target.parent.rmdir()
        raise


def describe(
    source: Source,
    config: ModelConfig,
    file: Path,
    *,
    name: str,
    type: str,
    checks: dict[str, Any],
    speed: dict[str, Any],
    warnings: list[str],
    packages: tuple[str, ...],
    **more: Any,
) -> dict[str, Any]:
    """The manifest of ``file``, which will be called ``name``."""
    left_out = {"initializer_range", "mixer", "schedule", *RECURSIVE_KEYS}
    dimensions = config.model_dump(exclude=left_out)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "kind": "deployment",
        "format": artifacts.FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "file": {
            "name": name,
            "bytes": file.stat().st_size,
            "sha256": artifacts.sha256_file(file),
        },
        "type": type,
        **more,
        "model": {"name": source.name, "parameters": config.num_parameters, **dimensions},
        # Two bytes a value, as llama.cpp keeps keys and values unless told otherwise.
        "kv_cache_bytes_at_full_context": 2 * cache * config.max_position_embeddings,
        "source": {
            "checkpoint": str(source.checkpoint),
            "step": source.manifest.get("options", {}).get("step"),
            "weights": source.weights(),
        },
        "checks": checks,
        "speed": speed,
        "warnings": warnings,
        "versions": artifacts.versions("torch", *packages),
    }


def missing_extra(what: str, extra: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"{what}. Install it with:\n  pip install 'thimble-lm[{extra}]'")
