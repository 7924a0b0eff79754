"""The recursive model and its training step as the papers write them down, and no better.

What ``recursion.py`` measures thimble against: TRM (arXiv:2510.04871) in plain eager PyTorch, with
what its published code does at each step: weights cast at every call, norm, rotation and SwiGLU
operation by operation in float32, logits of every position, their cross-entropy in float64, the
answer's words looked up twice, rows padded to the full length, optimizer and average in loops over
the parameters, and generation that computes the whole window anew for every token.

Names of parameters are ``RecursiveLM``'s, so that one state dict serves both.

One thing differs from the published code, since otherwise the two would not compute the same: the
halting head reads the position it is given, not always the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thimble.config.model import ModelConfig

IGNORE = -100


class CastLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(x_bthc: Tensor, cos_tc: Tensor, sin_tc: Tensor) -> Tensor:
    wide = x_bthc.to(cos_tc.dtype)
    turned = wide * cos_tc.unsqueeze(-2) + rotate_half(wide) * sin_tc.unsqueeze(-2)
    return turned.to(x_bthc.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.size = config.num_attention_heads, config.head_dim
        self.causal = config.causal
        self.qkv = CastLinear(config.hidden_size, 3 * self.heads * self.size)
        self.output = CastLinear(self.heads * self.size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        qkv = self.qkv(x).view(batch, time, 3 * self.heads, self.size)
        q, k, v = qkv.chunk(3, dim=2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.output(y.transpose(1, 2).reshape(batch, time, -1))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = CastLinear(config.hidden_size, 2 * config.intermediate_size)
        self.down = CastLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer, self.mlp, self.eps = Attention(config), SwiGLU(config), config.rms_norm_eps

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = rms_norm(x + self.mixer(x, cos, sin), self.eps)
        return rms_norm(x + self.mlp(x), self.eps)


class Stack(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, z: Tensor, injected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        z = z + injected
        for block in self.blocks:
            z = block(z, cos, sin)
        return z


class PlainRecursion(nn.Module):
    """TRM: one stack, two latents, gradients through the last H cycle. Weights are undefined until
    those of a ``RecursiveLM`` are loaded."""

    H_init: Tensor
    L_init: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        width, size = config.hidden_size, config.head_dim
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.stacks = nn.ModuleList([Stack(config)])
        self.head = CastLinear(width, config.vocab_size)
        self.q_head = nn.Linear(width, 2)
        self.register_buffer("H_init", torch.empty(width))
        self.register_buffer("L_init", torch.empty(width))
        exponent = torch.arange(0, size, 2, dtype=torch.float32) / size
        angle = torch.outer(
            torch.arange(config.max_position_embeddings, dtype=torch.float32),
            config.rope_theta**-exponent,
        )
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def initial(self, batch: int, time: int) -> tuple[Tensor, Tensor]:
        shape = (batch, time, self.config.hidden_size)
        return tuple(z.to(self.dtype).expand(shape) for z in (self.H_init, self.L_init))  # type: ignore[return-value]

    def step(self, z_H: Tensor, z_L: Tensor, ids_bt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One supervision step -> z_H, z_L and the logits of every position [B, T, V]."""
        config, net = self.config, self.stacks[0]
        x = math.sqrt(config.hidden_size) * F.embedding(
            ids_bt, self.embedding.weight.to(self.dtype)
        )
        cos, sin = self.cos[: ids_bt.shape[1]], self.sin[: ids_bt.shape[1]]
        with torch.no_grad():
            for _ in range(config.H_cycles - 1):
                for _ in range(config.L_cycles):
                    z_L = net(z_L, z_H + x, cos, sin)
                z_H = net(z_H, z_L, cos, sin)
        for _ in range(config.L_cycles):
            z_L = net(z_L, z_H + x, cos, sin)
        z_H = net(z_H, z_L, cos, sin)
        return z_H, z_L, self.head(z_H)

    @torch.no_grad()
    def next_token(self, ids: Tensor, count: int, steps: int) -> Tensor:
        """The likeliest token [B] after the first ``count`` of a window [B, T] padded to its full
        width: every position, all supervision steps, each with its logits, as the published
        generation does it."""
        z_H, z_L = self.initial(*ids.shape)
        for _ in range(steps):
            z_H, z_L, logits = self.step(z_H, z_L, ids)
        return logits[:, count - 1].argmax(-1)


def stablemax_losses(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(torch.float64)
    size = torch.where(wide < 0, 1 / (1 - wide + 1e-30), wide + 1)
    log_p = torch.log(size / size.sum(dim=-1, keepdim=True))
    return picked(log_p, labels)


def softmax_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return picked(torch.log_softmax(logits.to(torch.float64), dim=-1), labels)


def picked(log_p: Tensor, labels: Tensor) -> Tensor:
    """Minus the log probability of each label, 0 where there is none: [B, T]."""
    valid = labels != IGNORE
    index = torch.where(valid, labels, 0).to(torch.long)
    chosen = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return -torch.where(valid, chosen, 0)


LOSSES = {"stablemax": stablemax_losses, "softmax": softmax_losses}


@dataclass
class PlainCarry:
    z_H: Tensor
    z_L: Tensor
    steps: Tensor
    halted: Tensor
    inputs: Tensor
    labels: Tensor
    position: Tensor


class PlainTraining:
    """Model, carry, Adam-atan2 and average, each as a loop."""

    def __init__(
        self,
        model: PlainRecursion,
        form: str,
        *,
        rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        decay: float = 0.1,
        ema: float = 0.999,
    ) -> None:
        self.model, self.loss = model, LOSSES[form]
        self.rate, self.betas, self.decay, self.ema = rate, betas, decay, ema
        self.count = 0
        self.parameters = dict(model.named_parameters())
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.carry: PlainCarry | None = None

    def loss_of(self, inputs: Tensor, labels: Tensor, position: Tensor) -> Tensor:
        """Forward of one supervision step of the carry, whose free rows take the new ones."""
        model, config, batch = self.model, self.model.config, len(inputs)
        carry = self.carry or PlainCarry(
            torch.empty(*inputs.shape, config.hidden_size, dtype=model.dtype, device=inputs.device),
            torch.empty(*inputs.shape, config.hidden_size, dtype=model.dtype, device=inputs.device),
            torch.zeros_like(position),
            torch.ones_like(position, dtype=torch.bool),
            *(torch.zeros_like(part) for part in (inputs, labels, position)),
        )
        free = carry.halted
        begin_H, begin_L = model.initial(*inputs.shape)
        z_H = torch.where(free.view(-1, 1, 1), begin_H, carry.z_H)
        z_L = torch.where(free.view(-1, 1, 1), begin_L, carry.z_L)
        inputs = torch.where(free.view(-1, 1), inputs, carry.inputs)
        labels = torch.where(free.view(-1, 1), labels, carry.labels)
        position = torch.where(free, position, carry.position)
        steps = torch.where(free, 0, carry.steps) + 1

        z_H, z_L, logits = model.step(z_H, z_L, inputs)
        q_halt = model.q_head(z_H[torch.arange(batch, device=z_H.device), position].float())[:, 0]

        valid = labels != IGNORE
        counts = valid.sum(-1)
        each = counts.clamp(min=1).unsqueeze(-1)
        with torch.no_grad():
            self.predictions = logits.argmax(-1)  # for whoever wants to see them
            right = valid & (logits.argmax(-1) == labels)
            exact = right.sum(-1) == counts
            self.accuracy = (right.to(torch.float32) / each).sum()
            halted = (steps >= config.halt_max_steps) | (q_halt > 0)
            explores = torch.rand_like(q_halt) < config.halt_exploration_prob
            least = explores * torch.randint_like(steps, 2, max(config.halt_max_steps, 2) + 1)
            halted = halted & (steps >= least)
        token_loss = (self.loss(logits, labels) / each).sum()
        halt_loss = F.binary_cross_entropy_with_logits(
            q_halt, exact.to(q_halt.dtype), reduction="sum"
        )
        self.carry = PlainCarry(z_H.detach(), z_L.detach(), steps, halted, inputs, labels, position)
        return (token_loss + 0.5 * halt_loss) / batch

    def step(self, inputs: Tensor, labels: Tensor, position: Tensor) -> Tensor:
        """Forward, backward, update. Returns the loss."""
        loss = self.loss_of(inputs, labels, position)
        loss.backward()
        self.update()
        for parameter in self.parameters.values():
            parameter.grad = None
        return loss.detach()

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        (beta1, beta2), rate = self.betas, self.rate
        for name, parameter in self.parameters.items():
            grad = parameter.grad
            if grad is None:
                continue
            parameter.mul_(1 - rate * self.decay)
            first, second = self.first[name], self.second[name]
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            mean = first / (1 - beta1**self.count)
            size = (second / (1 - beta2**self.count)).sqrt()
            parameter.add_(torch.atan2(mean, size), alpha=-rate)
        for name, parameter in self.parameters.items():
            self.average[name] = self.ema * self.average[name] + (1 - self.ema) * parameter
