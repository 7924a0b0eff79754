"""Quantized weights on disk: compressed-tensors' ``pack-quantized``, which transformers reads.

A linear map's weight ``[out, in]`` becomes three tensors, with ``bits`` of 4 or 8:

- ``weight_packed`` int32 ``[out, in x bits / 32]``: codes + 2^(bits-1), the first in the low bits
- ``weight_scale`` float16 ``[out, in / group]``: a step for each group of columns
- ``weight_shape`` int64 ``[2]``

and stands for ``code x scale``: symmetric, codes from -2^(bits-1) to 2^(bits-1) - 1. All else is
kept as a plain tensor in float16.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thimble.config.model import ModelConfig
from thimble.errors import DataError

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
GROUPS = (128, 64, 32, 16)
PARTS = {"attention": "self_attn", "mlp": "mlp"}  # name of a part -> of its module in the file


def group_size(config: ModelConfig) -> int:
    """The largest group that divides the input width of every quantized map.

    Raises DataError when none does.
    """
    attention = config.num_attention_heads * config.head_dim
    widths = (config.hidden_size, attention, config.intermediate_size)
    for size in GROUPS:
        if all(width % size == 0 for width in widths):
            return size
    raise DataError(
        f"The model's widths {', '.join(map(str, widths))} are not all multiples of {GROUPS[-1]}, "
        "so its weights cannot be quantized in groups."
    )


def pack(codes: Tensor, scale: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes [out, in] and scale [out, in / group] as the tensors that stand for ``.weight``."""
    assert sys.byteorder == "little"
    stored = (codes + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        stored = stored[:, ::2] | stored[:, 1::2] << 4
    return {
        PACKED: stored.contiguous().view(torch.int32),
        SCALE: scale.to(torch.float16).contiguous(),
        SHAPE: torch.tensor(codes.shape),
    }


def unpack(tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The tensors of a file with every packed weight as a float32 ``.weight`` [out, in].

    Raises DataError when parts of a packed weight are missing or do not fit each other.
    """
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith(PACKED)]:
        base = name.removesuffix(PACKED)
        try:
            packed, scale = plain.pop(name), plain.pop(base + SCALE)
            rows, columns = plain.pop(base + SHAPE).tolist()
            plain[base + ".weight"] = _weight(packed, scale, rows, columns)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the packed weight of {base} is damaged: {error}.") from error
    return plain


def _weight(packed: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    if packed.dtype != torch.int32:
        raise TypeError(f"{packed.dtype} instead of int32")
    stored = packed.view(torch.uint8)
    bits = 32 * packed.shape[1] // max(columns, 1)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
    elif bits != 8:
        raise ValueError(f"{bits} bits for each weight instead of 4 or 8")
    codes = stored.view(rows, scale.shape[1], -1).float() - 2 ** (bits - 1)
    return (codes * scale.float().unsqueeze(-1)).view(rows, columns)


def quantization_config(bits: Mapping[str, int], group: int) -> dict[str, Any]:
    """``quantization_config`` for config.json: which maps are packed, in how many bits.

    ``bits``: of the parts "attention" and "mlp".
    """
    targets = {number: ["Linear"] for number in bits.values()}
    if len(targets) > 1:
        targets = {n: [rf"re:.*\.{PARTS[part]}\..*_proj$"] for part, n in bits.items()}
    weights = {
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": names,
                "weights": {"num_bits": number, **weights},
                "input_activations": None,
                "output_activations": None,
            }
            for index, (number, names) in enumerate(targets.items())
        },
        "ignore": ["lm_head"],
    }


def check(quantization: Mapping[str, Any] | None, where: object) -> None:
    """Raise DataError unless the ``quantization_config`` of ``where`` is of the kind we read."""
    if quantization is None:
        return
    groups = list(quantization.get("config_groups", {}).values())
    readable = (
        quantization.get("quant_method") == METHOD
        and quantization.get("format") == FORMAT
        and all(
            group.get("input_activations") is None
            and group["weights"]["symmetric"]
            and group["weights"]["type"] == "int"
            and group["weights"]["num_bits"] in (4, 8)
            and group["weights"].get("actorder") in (None, "static", "weight")
            for group in groups
        )
    )
    if not readable:
        raise DataError(
            f"{where} is quantized with {quantization.get('quant_method') or 'an unknown method'} "
            f"({quantization.get('format') or 'no format named'}); thimble reads symmetric "
            f"{FORMAT} of {METHOD}, four or eight bits, weights only. Use the model it was made of."
        )


def expected_bytes(config: ModelConfig, bits: Mapping[str, int], group: int) -> int:
    """Bytes of all tensors of a quantized checkpoint, from the shapes in its configuration."""
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    hidden, wide = config.hidden_size, config.intermediate_size
    maps = {  # [out, in]
        "attention": [(heads, hidden), (kv_heads, hidden), (kv_heads, hidden), (hidden, heads)],
        "mlp": [(wide, hidden), (wide, hidden), (hidden, wide)],
    }
    layer = 2 * 2 * hidden  # two norms
    for part, shapes in maps.items():
        for rows, columns in shapes:
            layer += rows * columns * bits[part] // 8 + 2 * rows * columns // group + 16
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    return config.num_hidden_layers * layer + 2 * (embeddings + hidden)
