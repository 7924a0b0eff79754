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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thimble.config.schema import Config, ModelConfig
from thimble.models import interop
from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM
from thimble.objectives import linear_cross_entropy
from thimble.objectives.act import ACT, empty_carry
from thimble.objectives.distillation import Distillation, blend
from thimble.objectives.next_token import NextToken
from thimble.training.data import separated
from thimble.training.ema import EMA
from thimble.training.optimizer import make_optimizer
from thimble.training.teacher_costs import answers, ask, local_config


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by part.

    ``gradients`` are there during the passes only where several micro-batches add to them.
    ``optimizer``: moments, and averages of the weights where a run keeps them. ``logits``: of one
    chunk of positions, with the gradients that the loss computes at once.
    ``activations``: what autograd keeps for the backward pass, and what operations need for the
    moment. ``teacher``: the weights of one that is loaded beside the student. ``other``: the
    process itself and what its allocator does not give back; on a GPU 0.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int = 0
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
        if function is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            # Which positions have a target is not known: all of them, at most.
            function, args = torch.ops.aten.new_empty.default, (args[0], [args[0].numel(), 1])
            kwargs = {"dtype": torch.int64}
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
        student = _simulate(config, dtype, device_type)
    else:
        two, three = (
            _simulate(_with_layers(config, layers), dtype, device_type) for layers in (2, 3)
        )
        small, large = asdict(two), asdict(three)
        student = Memory(
            **{part: small[part] + (depth - 2) * (large[part] - small[part]) for part in small}
        )
    shape = local_config(config) if config.teacher.mode == "direct" else None
    if shape is None:
        return student
    weights, passing = _teacher(config, shape, dtype, device_type)
    # It is asked before the student's pass, so the larger of both passes counts.
    activations = max(student.activations, passing - student.logits)
    return replace(student, teacher=weights, activations=activations)


def _teacher(
    config: Config, shape: ModelConfig, dtype: torch.dtype, device_type: str
) -> tuple[int, int]:
    """Bytes of a teacher's weights, and of what being asked about a micro-batch needs beside."""
    # Nothing is kept from block to block, so two of them need as much as all.
    few = shape.model_copy(update={"num_hidden_layers": min(shape.num_hidden_layers, 2)})
    sections = (few, config.objective, config.teacher, config.training)
    key = (*(section.model_dump_json() for section in sections), dtype, device_type)
    if key not in _asked:
        training = config.training
        with _chunks_of(device_type), FakeTensorMode(), Allocations() as count:
            model = CausalLM(few).to(dtype).requires_grad_(False)
            model.compute_dtype = dtype
            ids = torch.zeros(
                (training.micro_batch_size, training.sequence_length), dtype=torch.int64
            )
            count.peak = before = count.live
            ask(model, config, ids)
            _asked[key] = count.peak - before
    return shape.num_parameters * dtype.itemsize, _asked[key]


def _with_layers(config: Config, layers: int) -> Config:
    model = config.model.model_copy(update={"num_hidden_layers": layers})
    return config.model_copy(update={"model": model})


_simulated: dict[tuple[Any, ...], Memory] = {}  # GPUs and stages often ask for the same
_asked: dict[tuple[Any, ...], int] = {}


def _simulate(config: Config, dtype: torch.dtype, device_type: str) -> Memory:
    model = config.model
    if model.schedule == "recursive":
        # Cycles without gradients leave nothing behind: one of them stands for all.
        cycles = min(model.H_cycles, model.bp_cycles + 1)
        config = config.model_copy(update={"model": model.model_copy(update={"H_cycles": cycles})})
    sections = (config.model, config.objective, config.optim, config.training, config.teacher)
    parts = (section.model_dump_json() for section in sections)
    key = (*parts, separated(config), dtype, device_type)
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
    starts = torch.zeros(ids.shape, dtype=torch.bool) if separated(config) else None
    if config.objective.name == "distill":
        student, how = Distillation(model), blend(config.objective, 0, 1)
        return lambda: student(ids, ids, starts, answers(config), how).loss
    if not isinstance(model, RecursiveLM) or config.objective.name != "act":
        objective = NextToken(model)
        return lambda: objective(ids, ids, starts)
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
