"""A checkpoint reduced to what ``from_pretrained`` reads, for giving it away."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thimble import artifacts
from thimble.config.load import Misspelt
from thimble.console import log
from thimble.errors import ConfigError, DataError, nearest
from thimble.export import deployment
from thimble.models import interop, interop_hrm_text, interop_recursive
from thimble.models.recursive import RecursiveLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BIN = "pytorch_model.bin"
FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "conversation.json",
)


def export(
    path: str | Path, output: str | Path, *, dtype: str | None = None, pickled: bool = False
) -> Path:
    """Write configuration, weights and tokenizer into the new folder ``output``; returns it.

    ``dtype`` is one of ``DTYPES`` (default: as it is); ``pickled`` writes ``pytorch_model.bin`` in
    place of safetensors. A recursive model becomes an ``hrm_text`` when it is one; otherwise it
    stays as it is, for programs that ``import thimble.hub``. Raises ConfigError for another dtype
    and for a model of puzzles; DataError when the checkpoint is not whole, is of an architecture
    that is not ours, does not fit the dtype, or ``output`` exists.
    """
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise Misspelt(f"There is no dtype {dtype}.", dtype, nearest(dtype, DTYPES), known)
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise DataError(f"{output} exists already. Remove it, or choose another folder with -o.")
    directory = deployment.find_source(path).checkpoint
    config, tensors = _contents(directory)
    if dtype is not None:
        config["dtype"] = dtype
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise DataError(f"{name} has values beyond {dtype}. Export it as float32.")
    with artifacts.atomic_directory(output) as folder:
        artifacts.write_json(folder / "config.json", config)
        for name in FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, folder / name)
        if pickled:
            torch.save(tensors, folder / BIN)
        else:
            from safetensors.torch import save_file

            save_file(tensors, folder / interop.WEIGHTS, metadata={"format": "pt"})
    return output


def _contents(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and the tensors as they are to be written."""
    model = interop.load_model(directory)  # refuses what does not fit together
    native = artifacts.read_json(directory / "config.json")
    if native["model_type"] == interop_recursive.MODEL_TYPE:
        assert isinstance(model, RecursiveLM)
        if not model.config.causal:
            raise ConfigError(
                f"{directory} holds a model of puzzles, for which transformers has no place. What "
                f"there is for it:\n  thimble evaluate {directory}"
            )
        differences = interop_hrm_text.differences(model.config)
        if not differences:
            special = {name: native[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
            config = interop_hrm_text.to_config(model.config, special)
            tensors = interop_hrm_text.to_tensors(model)
            return config, {name: tensor.contiguous() for name, tensor in tensors.items()}
        log.info(
            "transformers reads this model after `import thimble.hub`. To be read without thimble "
            "it would have to be an hrm_text, and it is not: %s.",
            "; ".join(differences),
        )
    return native, interop.read_tensors(directory)
