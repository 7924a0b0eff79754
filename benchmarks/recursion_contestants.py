"""Who takes part in ``recursion.py``: the models, the batches, a step and a token each way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from plain_recursion import PlainRecursion, PlainTraining
from torch import Tensor

from thimble.config.schema import ModelConfig, OptimConfig
from thimble.models.recursive import RecursiveLM
from thimble.objectives.act import ACT, Rows, empty_carry
from thimble.objectives.linear_cross_entropy import IGNORE
from thimble.training.ema import EMA
from thimble.training.optimizer import make_optimizer, make_sparse_optimizer

# Lengths of conversations. No data set is read: prompts, with their system message, and answers
# are drawn log-normally, about as long as SlimOrca's are taken to be.
PROMPT, ANSWER = (160, 0.9), (110, 1.0)  # median in tokens, deviation of the logarithm
POOL = 128  # batches sorted by length together, as thimble's loader does it
OPTIM = OptimConfig(name="adam_atan2", learning_rate=1e-4, weight_decay=0.1, ema_rate=0.999)
WAYS = {
    "plain": "plain eager, padded to {length}",
    "thimble-padded": "thimble, padded to {length}",
    "thimble": "thimble",
    "thimble-softmax": "thimble, softmax",
    "thimble-compiled": "thimble, compiled",
}


def model_config(width: int, vocab: int, length: int, steps: int) -> ModelConfig:
    """TRM's proportions: 2 layers, H 3, L 6, heads of 64, SwiGLU of 8/3 in whole 256s."""
    return ModelConfig(
        schedule="recursive",
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=-(-round(width * 8 / 3) // 256) * 256,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        halt_max_steps=steps,
    )


def make_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> RecursiveLM:
    model = RecursiveLM(config).initialize(torch.Generator().manual_seed(0)).to(device)
    model.compute_dtype = dtype
    return model


def make_plain(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> PlainRecursion:
    plain = PlainRecursion(config, dtype).to(device)
    plain.load_state_dict(make_model(config, dtype, device).state_dict())
    return plain


class Clock:
    """Seconds since it was made, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self) -> float:
        return self.now() - self.started


# --- the batches


def draw_batches(config: ModelConfig, batch: int, count: int, device: torch.device) -> list[Rows]:
    """``count`` batches, evenly spaced in a pool sorted by length, each as wide as it must be."""
    draw = np.random.default_rng(0)
    number, room = POOL * batch, config.max_position_embeddings
    prompt, answer = (
        np.maximum(1, draw.lognormal(np.log(median), deviation, number)).astype(int)
        for median, deviation in (PROMPT, ANSWER)
    )
    answer = np.minimum(answer, room // 2 + np.maximum(room - room // 2 - prompt, 0))
    prompt = np.minimum(prompt, room - answer)
    order = np.argsort(prompt + answer, kind="stable").reshape(POOL, batch)
    batches = []
    for index in range(count):
        chosen = order[(2 * index + 1) * POOL // (2 * count)]
        lengths = prompt[chosen] + answer[chosen]
        width = min(-(-int(lengths.max()) // 8) * 8, room)
        inputs = np.zeros((batch, width), dtype=np.int64)
        labels = np.full((batch, width), IGNORE, dtype=np.int64)
        for row, (start, end) in enumerate(zip(prompt[chosen], lengths, strict=True)):
            ids = draw.integers(1, config.vocab_size, end + 1)
            inputs[row, :end] = ids[:-1]
            labels[row, start - 1 : end] = ids[start:]  # the answer, and what ends it
        batches.append(make_rows(inputs, labels, prompt[chosen] - 1, device))
    return batches


def make_rows(
    inputs: np.ndarray, labels: np.ndarray, position: np.ndarray, device: torch.device
) -> Rows:
    no_puzzle, weight = np.zeros_like(position), np.ones(len(inputs), dtype=np.float32)
    parts = (inputs, labels, position, no_puzzle, weight)
    return Rows(*(torch.from_numpy(part).to(device) for part in parts))


def padded(rows: Rows, length: int) -> Rows:
    more = (0, length - rows.inputs.shape[1])
    inputs, labels = F.pad(rows.inputs, more), F.pad(rows.labels, more, value=IGNORE)
    return replace(rows, inputs=inputs, labels=labels)


# --- the contestants of training


class Thimble:
    """thimble's objective, optimizer and average."""

    def __init__(self, model: RecursiveLM, form: str, *, compiled: bool = False) -> None:
        self.model = model
        self.act = ACT(model, form=form, per_sequence=True, compiled=compiled)
        self.optimizer = make_optimizer(model, OPTIM)
        self.sparse = make_sparse_optimizer(model, OPTIM)
        averaged = [(n, p) for n, p in model.named_parameters() if "puzzle_embedding" not in n]
        self.ema = EMA(averaged, OPTIM.ema_rate or 0.999)

    def loss(self, rows: Rows) -> Tensor:
        _, out = self.act(empty_carry(self.model, *rows.inputs.shape), rows)
        return out.mean()

    def step(self, rows: Rows) -> None:
        self.loss(rows).backward()
        for optimizer in filter(None, (self.optimizer, self.sparse)):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update()


class Plain:
    def __init__(self, model: PlainRecursion, form: str) -> None:
        self.model = model
        self.training = PlainTraining(model, form)

    def loss(self, rows: Rows) -> Tensor:
        self.training.carry = None
        return self.training.loss_of(rows.inputs, rows.labels, rows.position)

    def step(self, rows: Rows) -> None:
        self.training.carry = None
        self.training.step(rows.inputs, rows.labels, rows.position)


def contestant(
    way: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Callable[[Rows], None]:
    """A function that makes a training step of a batch; one of WAYS."""
    length = config.max_position_embeddings
    if way == "plain":
        step = Plain(make_plain(config, dtype, device), "stablemax").step
        return lambda rows: step(padded(rows, length))
    form = "softmax" if way == "thimble-softmax" else "stablemax"
    compiled = way == "thimble-compiled"
    step = Thimble(make_model(config, dtype, device), form, compiled=compiled).step
    if way == "thimble-padded":
        return lambda rows: step(padded(rows, length))
    return step


# --- generation


class Generation:
    """Seconds a token takes each way, as a mean over places in ``count`` tokens of ``batch``
    sequences. What the tokens and the caches hold makes no difference to the time."""

    def __init__(
        self, config: ModelConfig, count: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = make_model(config, dtype, device)
        self.plain = make_plain(config, dtype, device)
        length = config.max_position_embeddings
        self.window_ids = torch.ones(batch, length, dtype=torch.int64, device=device)
        self.state = self.model.new_state(batch, count)
        self.places = [(2 * part + 1) * count // 8 for part in range(4)]

    @torch.inference_mode()
    def cached(self, tokens: int = 8) -> float:
        """thimble: one position for each token."""
        tokens = min(tokens, self.places[0])
        clock = Clock(self.window_ids.device)
        for place in self.places:
            for cache in self.state:
                cache.length = place
            for _ in range(tokens):
                hidden = self.model.hidden(self.window_ids[:, :1], self.state)
                self.model.head(hidden[:, -1]).argmax(-1).tolist()
        return clock.seconds() / (tokens * len(self.places))

    @torch.inference_mode()
    def known(self) -> float:
        """thimble without caches: the positions known so far, one of them to the head."""
        clock = Clock(self.window_ids.device)
        for place in (first_and_last := self.places[::3]):
            hidden = self.model.hidden(self.window_ids[:, :place])
            self.model.head(hidden[:, -1]).argmax(-1).tolist()
        return clock.seconds() / len(first_and_last)

    def window(self) -> float:
        """The plain form: the whole window, all of its logits at every step."""
        clock = Clock(self.window_ids.device)
        steps = self.model.config.halt_max_steps
        self.plain.next_token(self.window_ids, self.places[0], steps).tolist()
        return clock.seconds()
