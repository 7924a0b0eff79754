from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from thimble.config.model import ModelConfig
from thimble.errors import DataError
from thimble.quantization import packed

TINY = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
}


def codes_and_scale(bits: int, group: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (6, 4 * group), generator=draw)
    codes[0, 0], codes[0, 1] = low, high - 1
    return codes.float(), torch.rand(6, 4, generator=draw).half()


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_the_reference_bit_for_bit(bits: int) -> None:
    codes, scale = codes_and_scale(bits)
    ours = packed.pack(codes, scale, bits)[packed.PACKED]
    assert torch.equal(ours, pack_to_int32(codes.to(torch.int8), bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_gives_code_times_scale(bits: int) -> None:
    codes, scale = codes_and_scale(bits)
    found = packed.pack(codes, scale, bits)
    file = {f"x{name}": tensor for name, tensor in found.items()} | {"y.weight": torch.ones(2)}
    plain = packed.unpack(file, "here")
    assert set(plain) == {"x.weight", "y.weight"}
    assert torch.equal(plain["x.weight"], codes * scale.float().repeat_interleave(16, dim=1))


def without_scale(file: dict[str, Any]) -> None:
    del file["x.weight_scale"]


def other_shape(file: dict[str, Any]) -> None:
    file["x.weight_shape"] = torch.tensor([6, 48])


def other_type(file: dict[str, Any]) -> None:
    file["x.weight_packed"] = file["x.weight_packed"].float()


def no_columns(file: dict[str, Any]) -> None:
    file["x.weight_shape"] = torch.tensor([6, 0])


@pytest.mark.parametrize("damage", [without_scale, other_shape, other_type, no_columns])
def test_a_damaged_weight_is_named(damage: Any) -> None:
    codes, scale = codes_and_scale(4)
    file = {f"x{name}": tensor for name, tensor in packed.pack(codes, scale, 4).items()}
    damage(file)
    with pytest.raises(DataError, match="here: the packed weight of x is damaged"):
        packed.unpack(file, "here")


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, 128),  # 256, 6 x 64 = 384, 1024
        ({"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3}, 64),
        ({"hidden_size": 96}, 32),
        ({"head_dim": 8, "num_attention_heads": 2}, 16),
    ],
)
def test_the_group_divides_every_width(change: dict[str, int], size: int) -> None:
    kv = {"num_key_value_heads": 1}
    assert packed.group_size(ModelConfig(**(TINY | kv | change))) == size


def test_widths_that_no_group_divides_are_refused() -> None:
    with pytest.raises(DataError, match="200"):
        packed.group_size(ModelConfig(**(TINY | {"hidden_size": 200})))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": packed.METHOD, "format": "float-quantized", "config_groups": {}},
        packed.quantization_config({"attention": 4, "mlp": 3}, 32),
    ],
)
def test_what_others_quantized_differently_is_refused(quantization: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="quantized"):
        packed.check(quantization, "here")


def test_asymmetric_weights_and_quantized_activations_are_refused() -> None:
    for key, value in (("input_activations", {"num_bits": 8}), ("symmetric", False)):
        config = packed.quantization_config({"attention": 4, "mlp": 4}, 32)
        packed.check(config, "here")
        group = config["config_groups"]["group_0"]
        (group if key in group else group["weights"])[key] = value
        with pytest.raises(DataError, match="here is quantized"):
            packed.check(config, "here")
