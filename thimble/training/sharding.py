"""FSDP2: parameters, gradients and moments in shards, each process holding its own (ZeRO stage 3).

It is applied to the model from outside. A block is gathered when it is used, and let go again; the
embedding, the last norm and the head, which the objective uses together, from the first use of a
step to its last. Checkpoints are whole, so that a run can go on with any number of processes.
(Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM
from thimble.objectives.next_token import NextToken

Network = CausalLM | RecursiveLM


def shard(objective: nn.Module, device: torch.device, count: int, *, compiled: bool) -> None:
    """Replace the parameters of the objective's model by this process's shards, on ``device``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (count,))
    assert isinstance(objective, NextToken)
    model = objective.model
    assert isinstance(model, CausalLM)  # the only one that is ever sharded
    # What a block computes with is gathered in that format: half the traffic, the same values. The
    # head adds up its gradient in float32, so it and the embedding stay in it.
    half = model.compute_dtype if model.compute_dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh)
    model.to(device)  # the buffers; parameters are there


def is_sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, from all processes, which must all ask; others as they are."""
    gather: Any = getattr(tensor, "full_tensor", None)  # importing DTensor takes a second
    return gather() if gather else tensor


def local(tensor: Tensor) -> Tensor:
    """The values of a tensor that this process holds, for what is done value by value."""
    piece: Any = getattr(tensor, "to_local", None)
    return piece() if piece else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a full tensor, when ``like`` is a shard; else the tensor."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # No source rank: everyone has the full tensor and cuts its own part, nothing is sent.
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


@contextlib.contextmanager
def usable(objective: nn.Module) -> Iterator[None]:
    """The model can be called by itself, not through its objective, by all processes together."""
    root: Any = objective
    if not hasattr(root, "unshard"):
        yield
        return
    root.unshard()
    try:
        # Blocks may be compiled, for a step's shapes; a growing cache has a new shape every time.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        root.reshard()


def gather(
    model: Network, optimizer: torch.optim.Optimizer, *, keep: bool
) -> tuple[Network, dict[str, Any]]:
    """A whole model and optimizer state, in main memory, for the process that ``keep``s them.

    Every process must call; what the others get is empty. One tensor at a time is whole on a
    device. Without shards these are the model and its optimizer's state themselves.
    """
    state = optimizer.state_dict()
    if not is_sharded(model):
        return model, state
    assert isinstance(model, CausalLM)  # the only one that is ever sharded

    def collect(tensor: Tensor) -> Tensor | None:
        full = whole(tensor.detach())
        return full.cpu() if keep else None

    weights = {name: collect(parameter) for name, parameter in model.named_parameters()}
    state["state"] = {
        index: {name: collect(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    with torch.device("meta"):
        copy = CausalLM(model.config)
    if keep:
        copy.load_state_dict(weights, strict=False, assign=True)
        if model.config.tie_word_embeddings:  # named_parameters names a shared one once
            copy.head.weight = copy.embedding.weight
    return copy, state


@torch.no_grad()
def scatter_weights(full: Network, model: Network) -> None:
    """Copy a whole model's weights into the shards of ``model``."""
    weights = dict(full.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(part(weights[name], parameter))


def scatter_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Cut what belongs to sharded parameters in an optimizer's whole state dict, in place."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        like = parameters[index]
        for name, value in values.items():
            if value.shape == like.shape:  # the count of steps has none
                values[name] = part(value, like)
