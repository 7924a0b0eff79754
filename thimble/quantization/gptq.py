"""GPTQ (arXiv:2210.17323): weights rounded one column after the other, the error of each put right
in the columns still to come, as far as calibration text says that it matters.

The rounding itself is neural-compressor's; here is the walk through our model. A row of a weight
does not depend on the others, so that maps which share their input (q, k and v; gate and up) are
quantized as the one map they are in our model, and give what they would give alone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thimble.console import unlogged
from thimble.errors import EnvironmentProblem
from thimble.models import interop
from thimble.models.causal_lm import Block, CausalLM
from thimble.models.layers import Linear
from thimble.quantization import packed

BATCH_TOKENS = 8192
DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
EXTRA = "quantize"


def kernel() -> Any:
    """neural-compressor's GPTQ of one linear map; EnvironmentProblem where it is not installed."""
    try:
        with unlogged():
            from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise EnvironmentProblem(
            f"Quantizing needs {missing}, which is not installed:\n"
            f"  pip install 'thimble-lm[{EXTRA}]'"
        ) from error
    logging.getLogger("neural_compressor").setLevel(logging.WARNING)
    return GPTQ


@torch.no_grad()
def quantize(
    model: CausalLM,
    windows_nt: Tensor,
    bits: Mapping[str, int],
    group: int,
    advance: Callable[[float], None] = lambda amount: None,
) -> dict[str, Tensor]:
    """Calibrate on ``windows_nt``, token ids [N, T]; ``model`` stays as it is.

    ``bits`` (4 or 8): of the parts "attention" and "mlp"; ``group`` columns share a scale. A block
    is calibrated with what the blocks before it give once they are quantized. ``advance(1)`` is
    called after each block. Returns the tensors of the checkpoint by their names in the file.
    """
    device = model.embedding.weight.device
    model = copy.deepcopy(model)
    scales = copy.deepcopy(model)  # its weights become the scales, spread over their groups
    batches = windows_nt.split(max(BATCH_TOKENS // windows_nt.shape[1], 1))
    # In host memory: all blocks' inputs of 1024 long windows may be more than a GPU has.
    hidden = [F.embedding(ids.to(device), model.embedding.weight).cpu() for ids in batches]
    rope = model.rope_2tc[:, : windows_nt.shape[1]]
    for block, scale_block in zip(model.blocks, scales.blocks, strict=True):
        assert isinstance(block, Block)
        assert isinstance(scale_block, Block)
        maps, scale_maps = _maps(block, bits), _maps(scale_block, bits)
        solvers = [_solver(layer, number, group) for layer, number in maps]
        hooks = [
            layer.register_forward_hook(
                lambda _, given, out, solver=solver: solver.add_batch(given[0], out)
            )
            for (layer, _), solver in zip(maps, solvers, strict=True)
        ]
        for x in hidden:
            block(x.to(device), rope)
        for hook in hooks:
            hook.remove()
        for (layer, number), (scale_layer, _), solver in zip(
            maps, scale_maps, solvers, strict=True
        ):
            scale, _, _, weight = solver.fasterquant(
                layer.weight.clone(), blocksize=group, percdamp=DAMPING, groupsize=group
            )
            # The scale as it will be stored, so that later blocks see the weights as stored.
            spread = scale.to(torch.float16).float().repeat_interleave(group, dim=1)
            layer.weight.copy_(codes_of(weight, spread, number) * spread)
            scale_layer.weight.copy_(spread)
        hidden = [block(x.to(device), rope).cpu() for x in hidden]
        advance(1)
    return _tensors(model, scales, bits, group)


def _maps(block: Block, bits: Mapping[str, int]) -> list[tuple[Linear, int]]:
    mixer, mlp = block.mixer, block.mlp
    attention = [(layer, bits["attention"]) for layer in (mixer.qkv, mixer.output)]
    return attention + [(layer, bits["mlp"]) for layer in (mlp.gate_up, mlp.down)]


def _solver(layer: Linear, bits: int, group: int) -> Any:
    solver = kernel()(layer, layer.weight, layer.weight.device)
    solver.quantizer.configure(
        {
            "dtype": "int",
            "bits": bits,
            "group_size": group,
            "sym": True,
            "perchannel": True,
            "mse": False,
            "use_double_quant": False,
            "double_quant_sym": False,
        }
    )
    return solver


def codes_of(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes of a weight, given its scale in the same shape [out, in]; float32."""
    codes = torch.round(weight / scale).nan_to_num()  # a scale may vanish in float16: 0 / 0
    return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _tensors(
    model: CausalLM, scales: CausalLM, bits: Mapping[str, int], group: int
) -> dict[str, Tensor]:
    of_module = {packed.PARTS[part]: number for part, number in bits.items()}
    spread = interop.to_native_tensors(scales)
    tensors: dict[str, Tensor] = {}
    for name, tensor in interop.to_native_tensors(model).items():
        part = next((part for part in name.split(".") if part in of_module), None)
        if part is None:
            tensors[name] = tensor.to(torch.float16)
            continue
        codes = codes_of(tensor, spread[name], of_module[part])
        found = packed.pack(codes, spread[name][:, ::group], of_module[part])
        tensors |= {name.removesuffix(".weight") + end: value for end, value in found.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
