"""A student that begins with its teacher's weights: a llama or mistral of any size.

What fits is copied, what is too large is cut down to what matters most of it, what is missing stays
as it was drawn:

    width        the same, or the principal directions of the teacher's hidden states
    layers       evenly spaced ones; where there are too few each comes several times, so much less
    heads        those whose way through the residual stream is the strongest
    head widths  of queries and keys evenly spaced rotary pairs, nearest in wavelength where both
                 have one rope_theta; of values the directions that carry most of what a head writes
    SwiGLU       the inner values of the largest weights

Retention has no softmax: it weighs by q . k, where attention weighs by exp(q . k), about 1 + q . k.
So each head's slowest rotary pair is given up for the 1: both become as nearly constant as a linear
function of the input can be, the least squares solution of "always 1". The gate begins as such a
constant, too, and a head's output columns take the size that the teacher's attention wrote in,
since retention's outputs are normalised. These are measured on a few windows of text. A head
forgets at the student's own rate. (SUPRA, arXiv:2405.06640, and MOHAWK, arXiv:2408.10189, begin
alike.)

Shapes: D, d widths of teacher and student; W = [outputs, inputs] as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thimble.errors import ConfigError
from thimble.models.attention import Attention
from thimble.models.causal_lm import CausalLM
from thimble.models.layers import plain_norm
from thimble.models.retention import Retention

OPEN = 2.0  # where silu is nearly linear and far from shut
RIDGE = 1e-3


@dataclass(frozen=True)
class Seen:
    """What was measured of a layer: mean [D] and second moment [D, D] of the mixer's normalised
    input before the norm's scale, and the second moment of each head's output [H, C, C]."""

    mean: Tensor
    moment: Tensor
    outputs: Tensor


@torch.no_grad()
def begin(student: CausalLM, teacher: CausalLM, ids_bt: Tensor) -> None:
    """Fill ``student``, as it was initialised, with the weights of ``teacher`` as described above.

    ids [B, T] of text: a few thousand tokens. Raises ConfigError for another vocabulary.
    """
    ours, theirs = student.config, teacher.config
    if ours.vocab_size > theirs.vocab_size:
        raise ConfigError(
            f"The teacher has {theirs.vocab_size:,} tokens, fewer than the student. To begin with "
            f"its weights:\n  model.vocab_size={theirs.vocab_size}"
        )
    moment, seen = measure(teacher, ids_bt)
    basis = directions(moment, ours.hidden_size)
    narrow = min(ours.hidden_size, theirs.hidden_size)
    # A norm divides by the size of fewer values, so what reads it has to make up for that.
    gain = (theirs.hidden_size / ours.hidden_size) ** 0.5
    same = ours.hidden_size == theirs.hidden_size

    def reading(weight: Tensor, norm: Tensor) -> Tensor:
        """[outputs, D], after a norm of that scale -> [outputs, at most d]."""
        return weight if same else (weight * norm) @ basis * gain

    _fill(student.embedding.weight, teacher.embedding.weight[: ours.vocab_size] @ basis)
    if not ours.tie_word_embeddings:
        head = teacher.head.weight[: ours.vocab_size]
        _fill(student.head.weight, reading(head, teacher.norm.weight))
    # A tied head reads through the norm, which keeps the teacher's scale along the basis.
    tied = ours.tie_word_embeddings
    scale = teacher.norm.weight if same else (basis * basis * teacher.norm.weight[:, None]).sum(0)
    if same:
        student.norm.weight.copy_(scale)
    elif tied:
        student.norm.weight[:narrow] = scale * gain
    chosen = layers(ours.num_hidden_layers, theirs.num_hidden_layers)
    for index, source in enumerate(chosen):
        block: Any = student.blocks[index]
        model: Any = teacher.blocks[source]
        share = 1 / chosen.count(source)
        norm = model.mixer_norm.weight
        if same:
            block.mixer_norm.weight.copy_(norm)
            block.mlp_norm.weight.copy_(model.mlp_norm.weight)
        _mixer(block.mixer, model.mixer, norm, seen[source], basis, reading, share, same)
        _swiglu(block.mlp, model.mlp, model.mlp_norm.weight, basis, reading, share)


def layers(wanted: int, there: int) -> list[int]:
    """The teacher's layer for each of the student's, from its first to its last."""
    if wanted == 1:
        return [there // 2]
    return [round(index * (there - 1) / (wanted - 1)) for index in range(wanted)]


def measure(teacher: CausalLM, ids_bt: Tensor) -> tuple[Tensor, list[Seen]]:
    """The second moment [D, D] of the hidden states of all layers, each layer counting alike
    however large its states are; and what there is to know of each layer."""
    width = teacher.config.hidden_size
    states = torch.zeros(width, width, dtype=torch.float64)
    seen: list[Seen] = []
    x = F.embedding(ids_bt, teacher.embedding.weight)
    rope = teacher.rope_2tc[:, : ids_bt.shape[1]]
    for block in teacher.blocks:
        mixer: Any = block.mixer
        states += _moment(x)
        flat = plain_norm(x, teacher.config.rms_norm_eps).flatten(0, 1).double()
        given: list[Tensor] = []
        handle = mixer.output.register_forward_pre_hook(
            lambda _, inputs, given=given: given.append(inputs[0])
        )
        x = block(x, rope)
        handle.remove()
        heads = given[0].flatten(0, 1).unflatten(-1, (mixer.num_heads, mixer.head_dim))
        outputs = torch.einsum("nhc,nhe->hce", heads, heads) / len(heads)
        seen.append(Seen(flat.mean(0), flat.t() @ flat / len(flat), outputs))
    return states + _moment(x), seen


def _moment(x_btd: Tensor) -> Tensor:
    flat = x_btd.flatten(0, 1).double()
    moment = flat.t() @ flat
    return moment / moment.trace().clamp(min=1e-12)


def directions(moment: Tensor, width: int) -> Tensor:
    """An orthonormal basis [D, at most width], float32, of the principal directions of a second
    moment [D, D]; all of the space as it is when it fits."""
    there = len(moment)
    if width >= there:
        return torch.eye(there)
    _, vectors = torch.linalg.eigh(moment)
    return vectors.flip(1)[:, :width].float().contiguous()


def _fill(slot: Tensor, values: Tensor) -> None:
    """Into the upper left of a weight; the rest stays as it was drawn."""
    slot[: values.shape[0], : values.shape[1]] = values[: slot.shape[0], : slot.shape[1]]


def _swiglu(mlp: Any, source: Any, norm: Tensor, basis: Tensor, reading: Any, share: float) -> None:
    gate, up = source.gate_up.weight.chunk(2)
    down = source.down.weight
    own_gate, own_up = mlp.gate_up.weight.chunk(2)
    strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = strength.topk(min(len(own_gate), len(gate))).indices.sort().values
    _fill(own_gate, reading(gate[kept], norm))
    _fill(own_up, reading(up[kept], norm))
    _fill(mlp.down.weight, share * (basis.t() @ down[:, kept]))


def _mixer(
    mixer: Retention | Attention,
    source: Attention,
    norm: Tensor,
    seen: Seen,
    basis: Tensor,
    reading: Any,
    share: float,
    same: bool,
) -> None:
    heads, size = source.num_heads, source.head_dim
    shared = heads // source.num_kv_heads
    kv_width = source.num_kv_heads * size
    q, k, v = source.qkv.weight.split([heads * size, kv_width, kv_width])
    q = q.unflatten(0, (heads, size))
    # Heads that share keys and values get them each.
    k, v = (x.unflatten(0, (-1, size)).repeat_interleave(shared, 0) for x in (k, v))
    o = source.output.weight.unflatten(1, (heads, size)).transpose(0, 1)  # [H, D, C]
    if isinstance(mixer, Attention):
        raise ConfigError(
            "A student of attention with a teacher's weights is that teacher: use "
            "training.load_checkpoint, or\n  model.mixer=retention"
        )
    wanted, wide = mixer.num_heads, mixer.value_head_dim
    # The squared norm of o @ v, without that product of all widths.
    strength = ((o.mT @ o) * (v @ v.mT)).sum((1, 2))
    order = strength.argsort(descending=True)[: min(wanted, heads)].sort().values.tolist()
    chosen = [order[index % len(order)] for index in range(wanted)]
    mine, theirs = pairs(mixer.head_dim, size)
    own_q, own_k, own_v, own_g = mixer.qkvg.weight.split(list(mixer.qkvg.parts))
    own_q, own_k = (x.unflatten(0, (wanted, mixer.head_dim)) for x in (own_q, own_k))
    own_v = own_v.unflatten(0, (wanted, wide))
    own_o = mixer.output.weight.unflatten(1, (wanted, wide))  # [d, H, V]
    openness = F.silu(torch.tensor(OPEN)).item()
    for index, head in enumerate(chosen):
        if mixer.head_dim > size:
            own_q[index].zero_()  # a pair that is missing asks for nothing yet
        for own, given in ((own_q, q), (own_k, k)):
            rows = reading(given[head][theirs], norm)
            own[index][mine, : rows.shape[1]] = rows[:, : own.shape[2]]
        values, writes, turn = v[head], o[head], torch.eye(size)
        if wide < size:  # the directions in which most is written
            left, strengths, right = _thin_svd(writes, values)
            values, turn = strengths[:wide, None] * right[:wide], left[:, :wide].t() @ writes
            writes = left[:, :wide]
        elif wide > size:
            own_v[index].zero_()  # what is missing writes nothing yet, and can learn to
        _fill(own_v[index], reading(values, norm))
        # Retention writes in size one, times the gate; the teacher's attention in this one.
        written = (turn @ seen.outputs[head].to(turn.dtype) @ turn.t()).trace() / wide
        often = share / chosen.count(head)
        _fill(own_o[:, index], often * written.sqrt() / openness * (basis.t() @ writes))
    row = _constant(seen, norm, basis, mixer.qkvg.weight.shape[1], same).to(own_g.dtype)
    slow, half = mixer.head_dim // 2 - 1, mixer.head_dim // 2
    for own in (own_q, own_k):  # 1 + q . k / sqrt(C), but for a factor
        own[:, slow] = 0
        own[:, slow, : len(row)] = size**0.25 * row
        own[:, slow + half] = 0
    own_g.mul_(0.1)  # the rows have to be able to become different
    own_g[:, : len(row)] += OPEN * row


def _thin_svd(tall: Tensor, wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of tall [D, C] @ wide [C, D], which has C values."""
    one, left = torch.linalg.qr(tall)
    other, right = torch.linalg.qr(wide.t())
    u, values, v = torch.linalg.svd(left @ right.t())
    return one @ u, values, v @ other.t()


def _constant(seen: Seen, norm: Tensor, basis: Tensor, width: int, same: bool) -> Tensor:
    """The row whose product with the student's input is 1, as nearly as it can be; float64."""
    # Of another width, the student's input lies along the basis, and its norm has no scale yet.
    along = basis.double().t() * (width / len(norm)) ** 0.5
    scale = norm.double().diag() if same else along
    moment, mean = scale @ seen.moment @ scale.t(), scale @ seen.mean
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(mean), dtype=moment.dtype)
    return torch.linalg.solve(moment + ridge, mean)


def pairs(wanted: int, there: int) -> tuple[list[int], list[int]]:
    """Rows of a head of ``wanted`` values, and the rows of one of ``there`` that go into them:
    evenly spaced rotary pairs (i, i + half), each once."""
    half, full = wanted // 2, there // 2
    fewer = min(half, full)
    mine = [index * half // fewer for index in range(fewer)]
    theirs = [index * full // fewer for index in range(fewer)]
    return [*mine, *(half + i for i in mine)], [*theirs, *(full + i for i in theirs)]
