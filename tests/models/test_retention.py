"""Retention: three forms of one sum, and the kernels' form of it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thimble.models import retention
from thimble.models.retention import (
    Kernels,
    Retained,
    chunkwise,
    parallel,
    recurrent,
    with_kernels,
)

Form = Callable[..., Retained]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def problem(
    time: int,
    dtype: torch.dtype = torch.float64,
    *,
    memory: bool,
    starts: bool,
    seed: int = 0,
    keys: int = 6,
    values: int = 10,
) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v, log gamma and, when asked for, a memory; and where documents begin."""
    draw = torch.Generator().manual_seed(seed)
    batch, heads = 2, 3
    shapes = [(batch, heads, time, width) for width in (keys, keys, values)]
    given = [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]
    given[0] *= keys**-0.5
    given.append(torch.log1p(-1 / torch.tensor([1.5, 40.0, 65536.0], dtype=dtype)))
    if memory:
        given.append(torch.randn(batch, heads, keys, values, generator=draw, dtype=dtype))
    where = torch.rand(batch, time, generator=draw) < 0.1
    where[0, 0], where[1, 0] = True, False  # a row that begins anew, and one that goes on
    return given, where if starts else None


def written_out(
    q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor, memory: Tensor | None, starts: Tensor | None
) -> Retained:
    """The definition, position by position and pair by pair, in Python's words."""
    batch, heads, time, _ = q.shape
    outputs = torch.zeros_like(v)
    last = torch.zeros(batch, heads, q.shape[3], v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            gamma = log_gamma[h].exp()
            begin = 0
            for n in range(time + 1):
                if n < time and starts is not None and starts[b, n]:
                    begin, seen = n, True
                elif n == 0:
                    seen = memory is None
                reach = range(begin, min(n + 1, time))
                total = sum(
                    (gamma ** (min(n, time - 1) - m) * torch.outer(k[b, h, m], v[b, h, m]))
                    for m in reach
                )
                if not seen:
                    assert memory is not None
                    total = total + gamma ** (min(n, time - 1) + 1) * memory[b, h]
                if n < time:
                    outputs[b, h, n] = q[b, h, n] @ total
                else:
                    last[b, h] = total
    return Retained(outputs, last)


def forms(time: int) -> list[Form]:
    chunks = sorted({1, 3, 8, time, time + 5})
    return [parallel, recurrent, *(functools.partial(chunkwise, chunk=c) for c in chunks)]


def gradients(form: Form, given: list[Tensor], starts: Tensor | None) -> list[Tensor]:
    """Of q, k, v (and the memory) of a number made of both results."""
    leaves = [x.clone().requires_grad_() for x in given]
    leaves[3] = given[3]
    q, k, v, log_gamma, *memory = leaves
    made = form(q, k, v, log_gamma, memory[0] if memory else None, starts)
    draw = torch.Generator().manual_seed(9)
    total = sum(
        (x * torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)).sum() for x in made
    )
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, [q, k, v, *memory]))


def close(mine: Any, theirs: Any, dtype: torch.dtype) -> None:
    torch.testing.assert_close(mine, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# --- the forms


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("starts", [False, True])
def test_the_forms_are_the_definition(memory: bool, starts: bool) -> None:
    given, where = problem(13, memory=memory, starts=starts)
    q, k, v, log_gamma, *before = given
    expected = written_out(q, k, v, log_gamma, before[0] if before else None, where)
    for form in forms(13):
        close(form(*given, starts_bt=where), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("time", [1, 2, 7, 24, 50])
def test_all_forms_agree(time: int, starts: bool, memory: bool, dtype: torch.dtype) -> None:
    given, where = problem(time, dtype, memory=memory, starts=starts, seed=time)
    expected = parallel(*given, starts_bt=where)
    slopes = gradients(parallel, given, where)
    for form in forms(time):
        close(form(*given, starts_bt=where), expected, dtype)
        scale = max(slope.abs().max() for slope in slopes)
        for mine, theirs in zip(gradients(form, given, where), slopes, strict=True):
            close(mine / scale, theirs / scale, dtype)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("chunk", [3, 8])
def test_the_number_of_chunks_computed_at_once_changes_nothing(
    chunk: int, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, where = problem(50, memory=True, starts=starts)
    expected = parallel(*given, starts_bt=where)
    for count in (1, 2, 5):
        monkeypatch.setattr(retention, "CHUNKS_AT_ONCE", count)
        close(chunkwise(*given, starts_bt=where, chunk=chunk), expected, torch.float64)


@pytest.mark.parametrize("pieces", [[50], [1] * 50, [20, 1, 8, 21], [3, 47]])
@pytest.mark.parametrize("starts", [False, True])
def test_the_memory_carries_over_calls(pieces: list[int], starts: bool) -> None:
    given, where = problem(50, memory=True, starts=starts)
    expected = parallel(*given, starts_bt=where)
    for form in (recurrent, parallel, functools.partial(chunkwise, chunk=8)):
        *parts, log_gamma, memory = given
        outputs, begin = [], 0
        for piece in pieces:
            end = begin + piece
            now = (x[:, :, begin:end] for x in parts)
            here = None if where is None else where[:, begin:end]
            made, memory = form(*now, log_gamma, memory, here)
            outputs.append(made)
            begin = end
        close(Retained(torch.cat(outputs, 2), memory), expected, torch.float64)


def test_a_document_is_what_it_is_alone() -> None:
    (q, k, v, log_gamma, memory), _ = problem(30, memory=True, starts=False)
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[0, [4, 5, 17]] = True
    made = chunkwise(q, k, v, log_gamma, memory, starts, chunk=8)
    for begin, end in ((4, 5), (5, 17), (17, 30)):
        alone = parallel(*(x[:1, :, begin:end] for x in (q, k, v)), log_gamma)
        close(made.outputs[:1, :, begin:end], alone.outputs, torch.float64)
    close(made.memory[:1], alone.memory, torch.float64)
    other = parallel(*(x[1:] for x in (q, k, v)), log_gamma, memory[1:])
    close(Retained(made.outputs[1:], made.memory[1:]), other, torch.float64)


def test_half_precision_adds_up_in_single() -> None:
    given, _ = problem(50, torch.float32, memory=True, starts=False)
    exact = parallel(*given)
    half = [x.bfloat16() for x in given[:3]] + given[3:]
    for form in forms(50):
        near = form(*half)
        assert near.outputs.dtype is torch.bfloat16
        assert near.memory.dtype is torch.float32
        assert (near.outputs - exact.outputs).norm() < 0.02 * exact.outputs.norm()
        assert (near.memory - exact.memory).norm() < 0.02 * exact.memory.norm()


# --- flash-linear-attention


def as_the_kernels_do(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g_gamma: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What flash-linear-attention documents: [B, T, H, C], and of several lengths one row."""
    q, k, v = (x.transpose(1, 2) for x in (q * scale, k, v))
    if cu_seqlens is None:
        made = recurrent(q, k, v, g_gamma, initial_state)
        return made.outputs.transpose(1, 2), made.memory if output_final_state else None
    assert len(q) == 1
    outputs, last = [], []
    bounds = cu_seqlens.tolist()
    assert initial_state is None or len(initial_state) == len(bounds) - 1
    for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
        before = None if initial_state is None else initial_state[index : index + 1]
        made = recurrent(*(x[:, :, begin:end] for x in (q, k, v)), g_gamma, before)
        outputs.append(made.outputs.transpose(1, 2))
        last.append(made.memory)
    return torch.cat(outputs, 1), torch.cat(last) if output_final_state else None


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("time", [1, 20, 70])
def test_the_kernels_are_given_what_they_want(time: int, starts: bool, memory: bool) -> None:
    given, where = problem(time, torch.float32, memory=memory, starts=starts, seed=3)
    called = []

    def kernel(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def call(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            called.append(name)
            return as_the_kernels_do(*args, **options)

        return call

    form = functools.partial(with_kernels, Kernels(kernel("chunk"), kernel("recurrent")))
    close(form(*given, starts_bt=where), parallel(*given, starts_bt=where), torch.float32)
    assert set(called) == {"chunk" if time == 70 else "recurrent"}
    without = form(*given, starts_bt=where, keep=False)
    assert without.memory is None
    close(without.outputs, form(*given, starts_bt=where).outputs, torch.float32)
    slopes = gradients(parallel, given, where)
    scale = max(slope.abs().max() for slope in slopes)
    for mine, theirs in zip(gradients(form, given, where), slopes, strict=True):
        close(mine / scale, theirs / scale, torch.float32)


def test_where_documents_begin_is_found_once_for_all_layers() -> None:
    starts = torch.tensor([[False, True, False], [True, False, True], [False, False, False]])
    found = retention.documents(starts)
    assert found.bounds.tolist() == [0, 1, 3, 5, 6, 9]
    assert found.firsts.tolist() == [0, 2, 4]
    assert found.lasts.tolist() == [1, 3, 4]
    assert retention.documents(starts) is found
    starts[0, 1] = False
    assert retention.documents(starts).bounds.tolist() == [0, 3, 5, 6, 9]
    assert retention.documents(starts.clone()).bounds.tolist() == [0, 3, 5, 6, 9]


def test_kernels_with_wrong_gradients_are_not_trained_with(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Worse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return slope * factor

    def wrong(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Any]:
        return as_the_kernels_do(q, Worse.apply(k), v, **options)

    def failing(*args: Tensor, **options: Any) -> tuple[Tensor, Any]:
        raise RuntimeError("no such instruction")

    factor, asked = 1.1, (torch.device("cpu"), torch.bfloat16, 3, 8, 16)
    with torch.inference_mode():
        assert retention.reliable(Kernels(as_the_kernels_do, as_the_kernels_do), *asked)
        assert not caplog.records
        assert not retention.reliable(Kernels(wrong, wrong), *asked)
        assert "off by 10 %" in caplog.text
        assert not retention.reliable(Kernels(failing, failing), *asked)
        assert "no such instruction" in caplog.text
        factor = math.nan
        assert not retention.reliable(Kernels(lambda *a, **o: wrong(*a, **o), wrong), *asked)


@pytest.mark.skipif(retention.find_kernels() is None, reason="flash-linear-attention and a GPU")
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("time", [1, 20, 300])
def test_the_real_kernels_are_near_the_exact_form(time: int, starts: bool, memory: bool) -> None:
    given, where = problem(time, torch.float32, memory=memory, starts=starts, keys=32, values=64)
    kernels = retention.find_kernels()
    on_gpu = [x.cuda() for x in given]
    where = None if where is None else where.cuda()
    half = [x.bfloat16() for x in on_gpu[:3]] + on_gpu[3:]
    form = functools.partial(retention.retain, kernels=kernels)
    for mine, theirs in zip(
        [*form(*half, starts_bt=where), *gradients(form, half, where)],
        [*parallel(*on_gpu, starts_bt=where), *gradients(parallel, on_gpu, where)],
        strict=True,
    ):
        assert (mine.float() - theirs).norm() < 0.02 * theirs.norm()


def test_without_a_gpu_or_without_the_package_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.compiler.disable(forms)  # imports what must not meet the broken import below
    find = retention.find_kernels.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(retention.importlib.util, "find_spec", lambda name: None)
    assert find() is None
    monkeypatch.setattr(retention.importlib.util, "find_spec", lambda name: name)

    def broken(name: str) -> Any:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(retention.importlib, "import_module", broken)
    with caplog.at_level("WARNING", logger="thimble"):
        assert find() is None
    assert "0 active drivers" in caplog.text

    class Ops:
        chunk_simple_gla = staticmethod(as_the_kernels_do)
        fused_recurrent_simple_gla = staticmethod(as_the_kernels_do)

    monkeypatch.setattr(retention.importlib, "import_module", lambda name: Ops)
    found = find()
    assert found[:2] == (as_the_kernels_do, as_the_kernels_do)
    assert found.check(found, torch.device("cpu"), torch.bfloat16, 3, 8, 16)


def test_kernels_are_for_half_precision_on_a_gpu() -> None:
    def never(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("not here")

    given, _ = problem(20, torch.float32, memory=False, starts=False)
    made = retention.retain(*given, kernels=Kernels(never, never))
    close(made, parallel(*given), torch.float32)
