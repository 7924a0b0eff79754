"""The recursive model's own checkpoint: ``config.json`` names every key of its configuration.

transformers has no such model; ``import thimble.hub`` makes its Auto classes read these files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from thimble.config.model import ModelConfig
from thimble.errors import DataError, nearest

MODEL_TYPE = "thimble_recursive"
ARCHITECTURE = "ThimbleRecursiveForCausalLM"
# What a checkpoint means that was written before these keys were.
BEFORE = {
    "position_embedding": "rope",
    "q_continue": False,
    "value_head_dim": None,
    "retention_horizons": [32.0, 65536.0],
    "retention_chunk": 64,
}
# What config.json holds beside the configuration, ours or as transformers writes it.
OTHER_KEYS = frozenset(
    {
        "model_type",
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def to_config(config: ModelConfig, special: dict[str, int | None]) -> dict[str, Any]:
    """``config.json``; ``special`` holds bos, eos and pad token ids, which a puzzle has not."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        **config.model_dump(),
        "dtype": "float32",
        "bos_token_id": special.get("bos"),
        "eos_token_id": special.get("eos"),
        "pad_token_id": special.get("pad"),
    }


def from_config(native: dict[str, Any], where: object, kind: str = MODEL_TYPE) -> ModelConfig:
    """The configuration in ``config.json``; DataError for a missing, unknown or wrong key."""
    if native.get("quantization_config"):
        raise DataError(f"{where} is quantized, which thimble does not read of {kind} models.")
    keys = ModelConfig.model_fields.keys()
    unknown = sorted(native.keys() - keys - OTHER_KEYS)
    if unknown:
        close = nearest(unknown[0], keys)
        raise DataError(
            f"{where} has the unknown key {unknown[0]}{f' ({close}?)' if close else ''}. It was "
            "written by a newer thimble, or changed by hand."
        )
    return parse(native, where, kind)


def parse(native: Mapping[str, Any], where: object, kind: str = MODEL_TYPE) -> ModelConfig:
    """The configuration among the keys of ``native``; DataError for one that is missing or wrong.

    None has a default here, ``BEFORE`` apart: what a model computes must not depend on who reads
    it.
    """
    keys = ModelConfig.model_fields.keys()
    native = BEFORE | dict(native)
    missing = sorted(keys - native.keys())
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}, which {kind} needs.")
    try:
        config = ModelConfig.model_validate({key: native[key] for key in keys})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise DataError(f"{where} is not usable: {f'{key}: ' if key else ''}{message}") from error
    schedule = "recursive" if kind == MODEL_TYPE else "once"
    if config.schedule != schedule:
        raise DataError(f"{where}: a {kind} model has schedule {schedule}, not {config.schedule}.")
    return config


def to_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own names -> tensors (views), with what z begins as; a tied head is left out."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:  # type: ignore[union-attr]
        del tensors["head.weight"]
    return tensors


def own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as ``thimble.hub``'s ``save_pretrained`` names them, under our names."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
