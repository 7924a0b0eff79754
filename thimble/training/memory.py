"""Peak memory of a training step, found by running one without data and without memory.

The real model, loss and optimizer run on fake tensors, which have shapes but no storage, and every
allocation and release is added up. So nothing here has to be kept in step with the model: whatever
autograd keeps and whatever an operation needs beside it is counted as it happens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thimble.config.schema import Config
from thimble.models import interop
from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM
from thimble.objectives import linear_cross_entropy
from thimble.objectives.act import ACT, empty_carry
from thimble.objectives.next_token import NextToken
from thimble.training.ema import EMA
from thimble.training.optimizer import make_optimizer


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by part.

    ``gradients`` are there during the passes only where several micro-batches add to them.
    ``optimizer``: moments, and averages of the weights where a run keeps them. ``logits``: of one
    chunk of positions, with the gradients that the loss computes at once.
    ``activations``: what autograd keeps for the backward pass, and what operations need for the
    moment. ``other``: the process itself and what its allocator does not give back; on a GPU 0.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


class Allocations(TorchDispatchMode):
    """Adds up the storages that operations under it make, until they are released."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A sparse one has none of its own: indices and values are tensors, and counted.
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def release(_: Any) -> None:
            self.live -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_memory(config: Config, dtype: torch.dtype, device_type: str) -> Memory:
    """The peak of a run's step in bytes, without torch.compile; takes a few seconds.

    Attention is taken to keep no scores, as the kernels of CPU and CUDA do; ``device_type`` decides
    how many positions' logits are held at a time. Blocks are all alike, so two depths are run and
    the others follow.
    """
    depth = config.model.num_hidden_layers
    if depth <= 3:
        return _simulate(config, dtype, device_type)
    two, three = (_simulate(_with_layers(config, layers), dtype, device_type) for layers in (2, 3))
    small, large = asdict(two), asdict(three)
    return Memory(
        **{part: small[part] + (depth - 2) * (large[part] - small[part]) for part in small}
    )


def _with_layers(config: Config, layers: int) -> Config:
    model = config.model.model_copy(update={"num_hidden_layers": layers})
    return config.model_copy(update={"model": model})


_simulated: dict[tuple[Any, ...], Memory] = {}  # GPUs and stages often ask for the same


def _simulate(config: Config, dtype: torch.dtype, device_type: str) -> Memory:
    model = config.model
    if model.schedule == "recursive":
        # Cycles without gradients leave nothing behind: one of them stands for all.
        cycles = min(model.H_cycles, model.bp_cycles + 1)
        config = config.model_copy(update={"model": model.model_copy(update={"H_cycles": cycles})})
    sections = (config.model, config.objective, config.optim, config.training)
    key = (*(section.model_dump_json() for section in sections), dtype, device_type)
    if key not in _simulated:
        _simulated[key] = _run(config, dtype, device_type)
    return _simulated[key]


def _run(config: Config, dtype: torch.dtype, device_type: str) -> Memory:
    training, vocabulary = config.training, config.model.vocab_size
    shape = (training.micro_batch_size, training.sequence_length)
    passes = min(training.gradient_accumulation_steps, 2)
    with _chunks_of(device_type), FakeTensorMode(), Allocations() as count:
        model = interop.new_model(config.model)
        model.compute_dtype = dtype
        model.checkpoint_activations = training.checkpoint_activations
        weights = count.live
        optimizer = make_optimizer(model, config.optim)
        rate = config.optim.ema_rate
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(name, p) for name, p in model.named_parameters() if id(p) in updated]
        averages = EMA(named, rate) if rate is not None else None
        ids = torch.zeros(shape, dtype=torch.int64)
        run = _pass(config, model, ids)
        for step in range(2):  # the optimizer's state is there from the second step on
            for _ in range(passes):
                run().backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            if averages is not None:
                averages.update()
            if step == 0:
                state = count.live - weights - ids.nbytes
                count.peak = 0
        rows = min(linear_cross_entropy.chunk_rows(torch.device("cpu"), vocabulary), ids.numel())
    gradients = 4 * config.model.num_parameters
    width = config.model.hidden_size
    # Logits and their float32 logarithm, the gradient of the head, that of the hidden states.
    logits = rows * vocabulary * (4 + dtype.itemsize) + vocabulary * width * 4
    logits += ids.numel() * width * dtype.itemsize
    parts = Memory(weights, gradients if passes > 1 else 0, state, 0, logits)
    return replace(parts, activations=max(count.peak - parts.total, 0))


def _pass(
    config: Config, model: CausalLM | RecursiveLM, ids: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """One micro-batch of the objective; of deep supervision with every position labelled."""
    if not isinstance(model, RecursiveLM) or config.objective.name != "act":
        objective = NextToken(model)
        return lambda: objective(ids, ids)
    options = config.objective
    act = ACT(model, form=options.form, per_sequence=options.per_sequence)
    carry = empty_carry(model, *ids.shape)
    positions = torch.zeros(ids.numel(), dtype=torch.int64)
    return lambda: act(carry, where=(positions, positions))[1].mean()


@contextmanager
def _chunks_of(device_type: str) -> Iterator[None]:
    """Let the loss, which here runs on the CPU, take as many positions at a time as elsewhere."""
    sizes = linear_cross_entropy.CHUNK_ELEMENTS
    before = dict(sizes)
    sizes["cpu"] = sizes.get(device_type, sizes["cpu"])
    try:
        yield
    finally:
        sizes.update(before)
