"""The checkpoint of a stack of retention that runs once: our own keys and names.

flash-linear-attention's ``retnet`` has a norm scale for each head, other decays and half as many
shapes, so it cannot hold this model. ``import thimble.hub`` makes transformers' Auto classes read
these files.
"""

from __future__ import annotations

from typing import Any

from thimble.config.model import ModelConfig
from thimble.errors import DataError
from thimble.models import interop_recursive

MODEL_TYPE = "thimble_retnet"
ARCHITECTURE = "ThimbleRetNetForCausalLM"


def to_config(config: ModelConfig, special: dict[str, int | None]) -> dict[str, Any]:
    """``config.json``; ``special`` holds bos, eos and pad token ids."""
    own = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}
    return interop_recursive.to_config(config, special) | own


def from_config(native: dict[str, Any], where: object) -> ModelConfig:
    """The configuration in ``config.json``; DataError for a missing, unknown or wrong key."""
    config = interop_recursive.from_config(native, where, MODEL_TYPE)
    if config.mixer != "retention":
        raise DataError(f"{where}: a {MODEL_TYPE} model has mixer retention, not {config.mixer}.")
    return config
