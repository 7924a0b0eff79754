"""Training on a CPU: thimble's step against transformers' Trainer and nanoGPT's step.

The same shape of model, batch, precision, optimizer and windows of tokens; the contestants take
turns within one run, and the table gives the median over the rounds with their ratio.

    python benchmarks/train_cpu.py --recipe slm_nano --compiled
    python benchmarks/train_cpu.py --recipe slm_tiny --nanogpt PATH_OF_A_CHECKOUT
    python benchmarks/train_cpu.py --attention
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from thimble.config.load import load
from thimble.config.schema import Config
from thimble.models import attention, interop
from thimble.models.causal_lm import CausalLM
from thimble.tokens.shards import TokenSplit
from thimble.training import language
from thimble.training.devices import describe, resolve_precision
from thimble.training.distributed import Processes
from thimble.training.loop import Trainer

CPU = torch.device("cpu")


class RandomTokens(TokenSplit):
    """Stands for a tokens directory where there is none: the speed does not depend on the text."""

    def __init__(self, vocab_size: int) -> None:
        draw = np.random.default_rng(0)
        tokens: Any = draw.integers(0, vocab_size, 2_000_000).astype(np.uint16)
        self.tokens = tokens
        self.vocab_size, self.eot_id = vocab_size, 0
        self.manifest = {"fingerprint": "random"}


def thimble_contestant(config: Config, data: RandomTokens) -> Callable[[int], float]:
    with mock.patch.object(language, "load_tokenizer"):  # there is none, and no step asks for it
        trainer = Trainer(config, data, CPU, Processes())

    def run(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            trainer.step()
        return time.perf_counter() - started

    return run


def transformers_contestant(config: Config, data: RandomTokens) -> Callable[[int], float]:
    import transformers

    training, length = config.training, config.training.sequence_length
    native = interop.to_native_config(config.model, {})
    kind = native.pop("model_type")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **native)
    )

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (len(data.tokens) - 1) // length

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(
                data.tokens[index * length : (index + 1) * length].astype(np.int64)
            )
            return {"input_ids": ids, "labels": ids}

    class Clock(transformers.TrainerCallback):
        started = 0.0
        seconds = 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:  # the first step warms up
                self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds = time.perf_counter() - self.started

    def run(steps: int) -> float:
        clock = Clock()
        arguments = transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps + 1,
            per_device_train_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            learning_rate=config.optim.learning_rate,
            weight_decay=config.optim.weight_decay,
            adam_beta2=config.optim.betas[1],
            max_grad_norm=config.optim.grad_clip,
            bf16=resolve_precision(config.precision, CPU) is torch.bfloat16,
            use_cpu=True,
            logging_steps=10_000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=Windows(), callbacks=[clock]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return clock.seconds

    return run


def nanogpt_contestant(
    config: Config, data: RandomTokens, checkout: Path
) -> Callable[[int], float]:
    """nanoGPT's model and the step of its train.py, at the same width, depth and vocabulary.

    Its block has learned positions, LayerNorm, as many key heads as query heads and a GELU layer of
    4 x width; so its parameters are given beside the result.
    """
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig

    shape, training = config.model, config.training
    heads = max(h for h in range(1, shape.num_attention_heads + 1) if shape.hidden_size % h == 0)
    with contextlib.redirect_stdout(sys.stderr):
        model = GPT(
            GPTConfig(
                block_size=training.sequence_length,
                vocab_size=shape.vocab_size,
                n_layer=shape.num_hidden_layers,
                n_head=heads,
                n_embd=shape.hidden_size,
                dropout=0.0,
                bias=False,
            )
        )
        betas = (config.optim.betas[0], config.optim.betas[1])
        optimizer = model.configure_optimizers(
            config.optim.weight_decay, config.optim.learning_rate, betas, "cpu"
        )
    print(f"nanoGPT: {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    half = resolve_precision(config.precision, CPU) is torch.bfloat16
    context = torch.amp.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    draw = np.random.default_rng(1)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        length = training.sequence_length
        starts = draw.integers(0, len(data.tokens) - length - 1, training.micro_batch_size)
        rows = np.stack([data.tokens[s : s + length + 1].astype(np.int64) for s in starts])
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())

    def run(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            for _ in range(training.gradient_accumulation_steps):
                inputs, targets = batch()
                with context:
                    _, loss = model(inputs, targets)
                (loss / training.gradient_accumulation_steps).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return run


def compare_attention() -> None:
    """Forward and backward of torch's attention and of the one with written-out scores."""
    dtype = resolve_precision("auto", CPU)
    print(f"{str(dtype).split(chr(46))[1]}, 8 sequences, 4 query and 2 key heads of 64")
    print("| positions | torch, ms | written out, ms | ratio |\n| --- | --- | --- | --- |")
    for length in (128, 256, 512, 1024):
        shape, kv_shape = (8, 4, length, 64), (8, 2, length, 64)
        times: dict[str, list[float]] = {"torch": [], "ours": []}
        for _ in range(8):
            for name in times:
                q = torch.randn(shape, dtype=dtype, requires_grad=True)
                k, v = (torch.randn(kv_shape, dtype=dtype, requires_grad=True) for _ in range(2))
                started = time.perf_counter()
                if name == "ours":
                    y = attention.short_causal_attention(q, k, v)
                else:
                    y = torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=True
                    )
                y.sum().backward()
                times[name].append(1e3 * (time.perf_counter() - started))
        a, b = (statistics.median(times[name]) for name in ("torch", "ours"))
        print(f"| {length} | {a:.1f} | {b:.1f} | {a / b:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="slm_nano")
    parser.add_argument("--override", action="append", default=[], help="key=value of the recipe")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to run beside ours")
    parser.add_argument("--compiled", action="store_true", help="also thimble with torch.compile")
    parser.add_argument("--steps", type=int, default=5, help="steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", action="store_true", help="only the two attention forms")
    options = parser.parse_args()
    print(f"{describe(CPU)}; Python {platform.python_version()}, torch {torch.__version__}")
    if options.attention:
        compare_attention()
        return
    import transformers

    print(f"transformers {transformers.__version__}")
    common = ["data.path=random", *options.override]
    # Everybody's optimizer is AdamW, whatever the recipe takes.
    config = load(options.recipe, [*common, "training.compile=off", "optim=adamw"])
    data = RandomTokens(config.model.vocab_size)
    contestants = {
        "thimble": thimble_contestant(config, data),
        "transformers Trainer": transformers_contestant(config, data),
    }
    if options.compiled:
        compiled = load(options.recipe, [*common, "training.compile=on", "optim=adamw"])
        contestants["thimble, compiled"] = thimble_contestant(compiled, data)
    own = load(options.recipe, [*common, "training.compile=off"])
    if own.optim.name != "adamw":
        contestants[f"thimble, {own.optim.name}"] = thimble_contestant(own, data)
    if options.nanogpt:
        contestants["nanoGPT's step"] = nanogpt_contestant(config, data, options.nanogpt)
    with torch.device("meta"):
        parameters = CausalLM(config.model).num_parameters()
    training = config.training
    tokens = (
        options.steps
        * training.micro_batch_size
        * training.gradient_accumulation_steps
        * training.sequence_length
    )
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run(1)  # warm-up, and compilation where there is any
    for _ in range(options.rounds):
        for name, run in contestants.items():
            rates[name].append(tokens / run(options.steps))
    print(
        f"{options.recipe}: {parameters:,} parameters, {training.micro_batch_size} x "
        f"{training.gradient_accumulation_steps} x {training.sequence_length} tokens a step, "
        f"{str(resolve_precision(config.precision, CPU)).split('.')[1]}, "
        f"{options.rounds} rounds of {options.steps} steps"
    )
    ours = statistics.median(rates["thimble"])
    print("| | tokens/s, median | slowest - fastest | thimble is |\n| --- | --- | --- | --- |")
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):,.0f} - {max(values):,.0f}"
        print(f"| {name} | {median:,.0f} | {spread} | {ours / median:.2f} x |")


if __name__ == "__main__":
    main()
