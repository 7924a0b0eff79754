"""Multi-scale retention: attention without softmax, whose past is one matrix of fixed size
(Sun et al. 2023, arXiv:2307.08621).

    o_n = sum over m <= n of  gamma^(n-m) (q_n . k_m) v_m          parallel
    S_n = gamma S_(n-1) + k_n^T v_n,   o_n = q_n S_n               recurrent

Each head has its own gamma, so that some look at the last words and some at the whole text. The two
lines are one sum, and ``chunkwise`` computes the same a third way: within chunks like the first,
from chunk to chunk like the second. Nothing is normalised before the norm that follows each head,
so the forms agree to rounding for any length and any chunk.

A document that begins at position n (``starts[n]``) sees nothing from before n.

Shapes: B batch, T time, H heads, C key and query width, V value width of a head, D hidden size,
N chunks of L positions. The memory S is [B, H, C, V], float32 or wider.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thimble.console import log
from thimble.models.layers import Linear, rotate

if TYPE_CHECKING:
    from thimble.config.schema import ModelConfig

# Chunks that are computed at once. What goes from one to another is a product with [chunks, chunks]
# weights, so with a bound on their number the work grows with the length, not with its square.
CHUNKS_AT_ONCE = 64


class Retained(NamedTuple):
    """Outputs [B, H, T, V], and the memory [B, H, C, V] after the last of them."""

    outputs: Tensor
    memory: Tensor


def decays(log_gamma_h: Tensor, size: int) -> Tensor:
    """gamma^(i-j) for j <= i, else 0: [H, size, size]."""
    steps = torch.arange(size, device=log_gamma_h.device, dtype=log_gamma_h.dtype)
    distance = steps[:, None] - steps
    return torch.exp(log_gamma_h[:, None, None] * distance.clamp(min=0)).tril()


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma_h: Tensor,
    memory: Tensor | None = None,
    starts_bt: Tensor | None = None,
) -> Retained:
    """One position after the other: what decoding does. See ``retain`` for the shapes."""
    memory = _memory(q, v, memory)
    gamma = log_gamma_h.to(memory.dtype).exp()[:, None, None]
    outputs = []
    for step in range(q.shape[2]):
        kept = memory
        if starts_bt is not None:
            kept = memory.masked_fill(starts_bt[:, step, None, None, None], 0)
        query, key, value = (x[:, :, step].to(memory.dtype) for x in (q, k, v))
        memory = torch.addcmul(gamma * kept, key[..., None], value[..., None, :])
        outputs.append(query[..., None, :] @ memory)
    return Retained(torch.cat(outputs, dim=2).to(q.dtype), memory)


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma_h: Tensor,
    memory: Tensor | None = None,
    starts_bt: Tensor | None = None,
) -> Retained:
    """All positions at once, with T x T weights. See ``retain`` for the shapes."""
    return _chunks(q, k, v, log_gamma_h, _memory(q, v, memory), starts_bt, q.shape[2])


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma_h: Tensor,
    memory: Tensor | None = None,
    starts_bt: Tensor | None = None,
    *,
    chunk: int = 64,
) -> Retained:
    """In chunks of ``chunk`` positions, many at a time; time and memory grow with T.

    See ``retain`` for the shapes.
    """
    time = q.shape[2]
    whole = time - time % chunk
    ends = [*range(0, whole, chunk * CHUNKS_AT_ONCE), whole, time]
    outputs, memory = [], _memory(q, v, memory)
    for start, end in itertools.pairwise(ends):
        if start == end:
            continue
        here = slice(start, end)
        starts = None if starts_bt is None else starts_bt[:, here]
        parts = q[:, :, here], k[:, :, here], v[:, :, here]
        made, memory = _chunks(*parts, log_gamma_h, memory, starts, min(chunk, end - start))
        outputs.append(made)
    return Retained(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), memory)


def _memory(q: Tensor, v: Tensor, memory: Tensor | None) -> Tensor:
    """The given memory or an empty one, wide enough to add up many positions."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if memory is not None:
        return memory.to(wide)
    return q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide)


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma_h: Tensor,
    memory: Tensor,
    starts_bt: Tensor | None,
    size: int,
) -> Retained:
    """N chunks of ``size`` positions at once, after ``memory``; T must be N x size."""
    count = q.shape[2] // size
    q, k, v = (x.unflatten(2, (count, size)) for x in (q, k, v))
    rate = log_gamma_h.to(memory.dtype)
    position = torch.arange(size, device=q.device, dtype=memory.dtype)
    within = decays(rate, size)[:, None]  # between positions of a chunk: [H, 1, L, L]
    ahead = torch.exp(rate[:, None, None] * (position + 1))  # from what was before it: [H, 1, L]
    left = torch.exp(rate[:, None, None] * (size - 1 - position))  # to its end: [H, 1, L]
    across = decays(rate * size, count + 1)  # between the ends of chunks: [H, N + 1, N + 1]
    if starts_bt is not None:
        # Positions of one document have one number; what is in the memory belongs to number 0.
        document = starts_bt.cumsum(1).view(-1, count, size)
        last = F.pad(document[:, :, -1], (1, 0))
        within = within * (document[..., :, None] == document[..., None, :])[:, None]
        ahead = ahead * (document == last[:, :-1, None])[:, None]
        left = left * (document == last[:, 1:, None])[:, None]
        across = across * (last[:, :, None] == last[:, None, :])[:, None]
    outputs = ((q @ k.mT) * within.to(q.dtype)) @ v
    added = (k * left[..., None].to(k.dtype)).mT @ v  # what each chunk adds: [B, H, N, C, V]
    ends = torch.cat([memory[:, :, None], added.to(memory.dtype)], dim=2)
    ends = (across @ ends.flatten(3)).view_as(ends)  # the memory before each chunk, and the last
    before = q @ ends[:, :, :-1].to(q.dtype)
    outputs = outputs + before * ahead[..., None].to(q.dtype)
    return Retained(outputs.flatten(2, 3), ends[:, :, -1])


# --- the kernels of flash-linear-attention


class Kernels(NamedTuple):
    """``chunk_simple_gla`` and ``fused_recurrent_simple_gla`` of flash-linear-attention >= 0.3:
    [B, T, H, C] in, outputs [B, T, H, V] and the last memory [sequences, H, C, V] out, which is
    None where it is not asked for. ``check`` is ``reliable``, or None for trust."""

    chunk: Callable[..., tuple[Tensor, Any]]
    recurrent: Callable[..., tuple[Tensor, Any]]
    check: Callable[..., bool] | None = None


# Below this many positions the recurrent kernel is the faster one, and for very few the other is
# not tested by its authors (fla-org/flash-linear-attention#88).
SHORT = 64
WIDEST = 256  # of a head's keys that the kernels take
NEAR = 0.02  # of their norm, what half precision may do to outputs and gradients


@functools.cache
def find_kernels() -> Kernels | None:
    """Of the installed flash-linear-attention; None without it or without a GPU.

    An installation that cannot be imported is named in the log and otherwise as good as none.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("fla") is None:
        return None
    try:
        ops = importlib.import_module("fla.ops.simple_gla")
        # The check is no part of what torch.compile compiles.
        check = torch.compiler.disable(reliable)
        return Kernels(ops.chunk_simple_gla, ops.fused_recurrent_simple_gla, check)
    except Exception as error:  # Triton raises what it likes
        log.warning("flash-linear-attention cannot be used, retention runs in torch: %s", error)
        return None


@functools.cache
def reliable(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, heads: int, keys: int, values: int
) -> bool:
    """Whether the kernels' gradients are, for heads of this shape, those of the exact form here.

    Compilers have made wrong ones of such kernels without a word: Triton from 3.4 to before 3.7.1
    on Hopper (fla-org/flash-linear-attention#640, of this one's sibling). Asked once, and what has
    to be compiled for it would be at the first step.
    """
    draw = torch.Generator().manual_seed(0)
    time = 2 * SHORT + 3  # whole chunks and a part of one
    wide = torch.promote_types(dtype, torch.float32)
    with torch.inference_mode(False), torch.enable_grad():
        shapes = [(1, heads, time, width) for width in (keys, keys, values)]
        given = [torch.randn(x, generator=draw).to(device, dtype) for x in shapes]
        given[0] = given[0] * keys**-0.5
        slope = torch.randn(shapes[2], generator=draw).to(device, dtype)
        log_gamma = torch.log1p(-1 / torch.linspace(8, 256, heads)).to(device)
        theirs = functools.partial(with_kernels, kernels, keep=False)
        forms: list[Callable[..., Retained]] = [chunkwise, theirs]
        found = []
        try:
            for form in forms:
                exact = form is chunkwise
                leaves = [x.detach().to(wide if exact else dtype).requires_grad_() for x in given]
                outputs = form(*leaves, log_gamma).outputs
                slopes = torch.autograd.grad(outputs, leaves, slope.to(outputs.dtype))
                found.append([outputs.detach(), *slopes])
            each = [
                (mine.to(wide) - right).norm() / right.norm()
                for right, mine in zip(*found, strict=True)
            ]
            apart = float(torch.stack(each).max())  # NaN if one is
        except Exception as error:  # Triton raises what it likes
            log.warning("flash-linear-attention fails here, retention runs in torch: %s", error)
            return False
    if not apart <= NEAR:
        log.warning(
            "flash-linear-attention's gradients are off by %.0f %% here, as Triton from 3.4 to "
            "before 3.7.1 makes them on Hopper GPUs; retention runs in torch",
            100 * apart,
        )
        return False
    return True


class Documents(NamedTuple):
    """Rows [B, T] with documents in them as sequences of different lengths in one row."""

    bounds: Tensor  # [sequences + 1]
    firsts: Tensor  # [B]: the sequence each row begins with
    lasts: Tensor  # [B]: and ends with


_known: tuple[Tensor, int, Documents] | None = None


def documents(starts_bt: Tensor) -> Documents:
    """All layers of a model ask about the same tensor, and every answer has to wait for the GPU: so
    the last one is kept. That it is the same one helps the kernels, too, which keep theirs."""
    global _known
    version = -1 if starts_bt.is_inference() else starts_bt._version
    if _known is not None and _known[0] is starts_bt and _known[1] == version:
        return _known[2]
    batch, time = starts_bt.shape
    first = torch.zeros_like(starts_bt)
    first[:, 0] = True
    begins = (starts_bt | first).flatten().nonzero()[:, 0]
    rows = torch.arange(batch + 1, device=begins.device) * time
    place = torch.searchsorted(begins, rows)
    found = Documents(F.pad(begins, (0, 1), value=batch * time), place[:-1], place[1:] - 1)
    _known = starts_bt, version, found
    return found


def with_kernels(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma_h: Tensor,
    memory: Tensor | None = None,
    starts_bt: Tensor | None = None,
    *,
    keep: bool = True,
) -> Retained:
    """``retain`` by flash-linear-attention's kernels, which accumulate in float32.

    Without ``keep`` there is no last memory: of many short documents those take more than all else.
    """
    batch, _, time, _ = q.shape
    kernel = kernels.recurrent if time < SHORT else kernels.chunk
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"g_gamma": log_gamma_h.float(), "scale": 1.0}
    options["output_final_state"] = keep
    if starts_bt is None:
        if memory is not None:
            memory = memory.float()
        made, last = kernel(q, k, v, initial_state=memory, **options)
        return Retained(made.transpose(1, 2), last)
    # A row that goes on with what it was in the middle of gives its first sequence the memory.
    found = documents(starts_bt)
    if memory is not None:
        going_on = memory.float().masked_fill(starts_bt[:, 0, None, None, None], 0)
        empty = going_on.new_zeros(len(found.bounds) - 1, *going_on.shape[1:])
        memory = empty.index_copy(0, found.firsts, going_on)
    joined = (x.reshape(1, batch * time, *x.shape[2:]) for x in (q, k, v))
    made, last = kernel(*joined, initial_state=memory, cu_seqlens=found.bounds, **options)
    outputs = made.view(batch, time, *made.shape[2:]).transpose(1, 2)
    return Retained(outputs, last[found.lasts] if keep else last)


# --- the mixer


def document_starts(config: ModelConfig, ids_bt: Tensor, end_id: int) -> Tensor | None:
    """Where documents begin among ids [B, T] in which each ends with ``end_id``; None for a mixer
    that sees across.

    A document begins with the end of the one before it, since its first word is predicted from
    there; so a text that is generated begins, too.
    """
    return ids_bt == end_id if config.mixer == "retention" else None


def retain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma_h: Tensor,
    memory: Tensor | None = None,
    starts_bt: Tensor | None = None,
    *,
    chunk: int = 64,
    kernels: Kernels | None = None,
    keep: bool = True,
) -> Retained:
    """Retention by the form that is fastest here.

    q, k [B, H, T, C]; v [B, H, T, V]; logarithm of each head's gamma [H]; ``memory`` [B, H, C, V]
    of what came before; ``starts`` bool [B, T], true where a document begins. Whether q or k is
    scaled is the caller's affair.

    ``kernels`` are used for half precision on a GPU. In float32 they would multiply with ten bits.
    Without ``keep`` they make no last memory.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    # Of odd widths the kernels read what is not theirs.
    fit = q.shape[3] <= WIDEST and q.shape[3] % 2 == v.shape[3] % 2 == 0
    if kernels is not None and q.is_cuda and half and fit:
        shape = q.shape[1], q.shape[3], v.shape[3]
        check = kernels.check if q.requires_grad else None
        if check is None or check(kernels, q.device, q.dtype, *shape):
            return with_kernels(kernels, q, k, v, log_gamma_h, memory, starts_bt, keep=keep)
    if q.shape[2] == 1:
        return recurrent(q, k, v, log_gamma_h, memory, starts_bt)
    return chunkwise(q, k, v, log_gamma_h, memory, starts_bt, chunk=chunk)


@dataclass
class RetentionState:
    """What a layer remembers of ``length`` positions: as much for one as for a million."""

    memory: Tensor
    length: int = 0

    @property
    def capacity(self) -> float:
        """Without end, unlike a cache's."""
        return float("inf")


class Retention(nn.Module):
    """``output(silu(gate) * norm(retention(q, k, v)))``, with a root mean square for each head.

    The norm has no scale of its own: ``output`` can have it in its columns. Queries and keys carry
    rotary positions. Queries, keys, values and gate come from one matrix.
    """

    log_gamma: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.value_head_dim, self.chunk = config.value_width, config.retention_chunk
        self.eps = config.rms_norm_eps
        keys, values = self.num_heads * self.head_dim, self.num_heads * self.value_head_dim
        self.qkvg = Linear(config.hidden_size, keys, keys, values, values)
        self.output = Linear(values, config.hidden_size)
        self.kernels = find_kernels()
        fastest, slowest = config.retention_horizons
        share = torch.linspace(0, 1, self.num_heads, dtype=torch.float64)
        horizons = fastest * (slowest / fastest) ** share
        self.register_buffer("log_gamma", torch.log1p(-1 / horizons).float(), persistent=False)

    def new_state(self, batch: int) -> RetentionState:
        """Nothing seen yet, for ``batch`` sequences."""
        shape = (batch, self.num_heads, self.head_dim, self.value_head_dim)
        wide = torch.promote_types(self.qkvg.weight.dtype, torch.float32)
        return RetentionState(torch.zeros(shape, dtype=wide, device=self.qkvg.weight.device))

    def forward(
        self,
        x_btd: Tensor,
        rope_2tc: Tensor,
        state: RetentionState | None = None,
        starts_bt: Tensor | None = None,
    ) -> tuple[Tensor, RetentionState | None]:
        """[B, T, D] -> [B, T, D]; ``rope_2tc`` holds the rows of these T positions.

        With a ``state`` the T positions follow what it has seen, and it is moved on. ``starts``
        [B, T] is true where a document begins.
        """
        heads, size = self.num_heads, self.head_dim
        widths = [2 * heads * size, *self.qkvg.parts[2:]]
        qk, v, gate = self.qkvg(x_btd).split(widths, dim=-1)
        # Queries and keys are neighbours, so one call rotates both.
        q, k = rotate(qk.unflatten(-1, (2 * heads, size)).transpose(1, 2), rope_2tc).chunk(2, 1)
        v = v.unflatten(-1, (heads, self.value_head_dim)).transpose(1, 2)
        outputs, memory = retain(
            q * size**-0.5,
            k,
            v,
            self.log_gamma,
            None if state is None else state.memory,
            starts_bt,
            chunk=self.chunk,
            kernels=self.kernels,
            keep=state is not None,
        )
        if state is not None:
            state.memory, state.length = memory, state.length + x_btd.shape[1]
        y = F.rms_norm(outputs, outputs.shape[-1:], None, self.eps).transpose(1, 2).flatten(2)
        return self.output(F.silu(gate) * y), state
