"""A checkpoint as one ONNX graph: ``input_ids`` in, ``logits`` out; with a cache if wanted.

Made by ``torch.onnx.export(dynamo=True)`` in float32, and checked with onnxruntime before the file
gets its name. Batch and sequence have any length within the context.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from thimble import artifacts
from thimble.console import log
from thimble.errors import DataError, NotAccepted
from thimble.export import deployment
from thimble.export.deployment import Export
from thimble.generation import model as generation
from thimble.models import interop
from thimble.models.attention import KVCache
from thimble.models.causal_lm import CausalLM
from thimble.training import devices

if TYPE_CHECKING:
    from thimble.generation import Model
    from thimble.tokens.shards import TokenSplit

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FILE = 2**31 - 2**20  # a protobuf message has at most 2 GiB
TOLERANCE = 1e-2  # largest difference of a logit
TOP = 5  # likeliest tokens that must be the same
TIE = 1e-4  # of logits this close either may come first
SHAPES = ((1, 1), (1, 2), (3, 7), (2, 64), (1, None))  # batch, sequence; None: a whole window


class Past(KVCache):
    """Keys and values that grow by concatenation: what a graph can express."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.length = keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        return self.keys, self.values


class Cached(nn.Module):
    """ids [B, T] and keys and values [B, K, P, C] of each block -> logits, and those of P + T."""

    def __init__(self, network: CausalLM) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        state: list[KVCache] = [Past(keys, values) for keys, values in past]
        logits = self.network(input_ids, state)
        return logits, *(tensor for layer in state for tensor in (layer.keys, layer.values))


def export(
    path: str | Path,
    *,
    output: str | Path | None = None,
    tokens: str | Path | None = None,
    cache: bool = False,
) -> Export:
    """Write a run's best checkpoint, or the one given, as ONNX, check it, and describe it.

    With ``cache`` the graph also takes ``past_key_values.N.key`` and ``.value`` [batch, key/value
    heads, past, head_dim] (past may be 0) and gives ``present.N.key`` and ``.value``. Raises
    DataError when the checkpoint does not fit or the target exists, NotAccepted when onnxruntime
    computes something else, EnvironmentProblem when a package is missing.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise deployment.missing_extra(f"ONNX needs the package {error.name}", "onnx") from error
    source = deployment.find_source(path)
    interop.refuse_own(source.checkpoint, "the graph that thimble writes")
    target = deployment.choose_target(source, output, ".onnx")
    model = generation.load(source.checkpoint, device="cpu")
    assert isinstance(model.network, CausalLM)
    size = 4 * model.config.num_parameters
    if size > LARGEST_FILE:
        raise DataError(
            f"The model has {size / 2**30:.1f} GiB in float32, and an ONNX file holds at most 2. "
            "Export it with thimble export gguf or thimble export transformers."
        )
    split = deployment.held_out(source, tokens, model.tokenizer)
    with deployment.file_and_manifest(target) as (file, manifest):
        log.info("tracing the model")
        write(model.network, file, cache=cache)
        opset = {item.domain or "ai.onnx": item.version for item in onnx.load(file).opset_import}
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        window = deployment.window_length(source, model.config)
        checks, speed = check(session, model, split, window)
        facts = deployment.describe(
            source,
            model.config,
            file,
            name=target.name,
            type="F32",
            opset=opset,
            inputs=[f"{item.name} {item.shape}" for item in session.get_inputs()],
            outputs=[f"{item.name} {item.shape}" for item in session.get_outputs()],
            checks=checks,
            speed=speed,
            warnings=[],
            packages=PACKAGES,
        )
        artifacts.write_json(manifest, facts)
    return Export(target, deployment.manifest_path(target), facts)


def write(network: CausalLM, file: Path, *, cache: bool) -> None:
    """Trace the network with example inputs and write the graph with its weights."""
    config = network.config
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    ids = torch.zeros(2, 4, dtype=torch.int64)
    names, outputs = ["input_ids"], ["logits"]
    graph: nn.Module = network.eval()
    example: tuple[Any, ...] = (ids,)
    shapes: tuple[Any, ...] = ({0: batch, 1: sequence},)
    if cache:
        layers = range(config.num_hidden_layers)
        parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
        names += [f"past_key_values.{part}" for part in parts]
        outputs += [f"present.{part}" for part in parts]
        past = torch.zeros(2, config.num_key_value_heads, 3, config.head_dim)
        grows = {0: batch, 2: torch.export.Dim("past")}
        # Each of its own: one tensor given twice would become one input of the graph.
        given = [(past.clone(), past.clone()) for _ in layers]
        graph, example = Cached(network).eval(), (ids, given)
        shapes = (*shapes, [(grows, grows) for _ in layers])
    with without_remarks(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    program.save(file, external_data=False)


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """Keep back what the exporter has to say about itself; its errors are raised all the same."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def check(
    session: Any, model: Model, split: TokenSplit | str, window: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Logits of onnxruntime against the model's at several shapes; what was found, and the speed.

    Raises NotAccepted when a logit is off by ``TOLERANCE`` or the ``TOP`` likeliest differ.
    """
    largest, rows, differing, ties, shapes = 0.0, 0, 0, 0, []
    top = min(TOP, model.config.vocab_size)
    for ids in examples(model, split, window):
        theirs = torch.from_numpy(run(session, model, ids))
        with torch.inference_mode():
            ours = model.network(torch.from_numpy(ids))
        shapes.append("x".join(map(str, ids.shape)))
        rows += ids.size
        largest = max(largest, float((ours - theirs).abs().nan_to_num(nan=math.inf).max()))
        values, wanted = ours.topk(top)
        found = theirs.topk(top).indices
        other = (found != wanted).any(-1)
        tied = ((ours.gather(-1, found) - values).abs() <= TIE).all(-1)
        differing += int(other.sum())
        ties += int((other & tied).sum())
    if not largest < TOLERANCE or differing > ties:
        raise NotAccepted(
            f"In onnxruntime the graph is not the model: its logits are off by up to {largest:.2g} "
            f"(allowed: {TOLERANCE:g}), and after {differing - ties:,} of {rows:,} tokens the "
            f"{top} likeliest are others. Nothing was written."
        )
    begun = time.perf_counter()
    run(session, model, ids)
    seconds = time.perf_counter() - begun
    known = f"random ids: {split}" if isinstance(split, str) else f"{split.directory} {split.split}"
    return {
        "result": "passed",
        "split": known,
        "batch_x_sequence": ", ".join(shapes),
        "tokens": rows,
        "largest_logit_difference": largest,
        f"top_{top}_differing": differing,
        f"top_{top}_ties": ties,
    }, {
        "prompt_tokens": ids.size,
        "prompt_tokens_per_second": round(ids.size / seconds, 1),
        "hardware": devices.describe(torch.device("cpu")),
    }


def examples(model: Model, split: TokenSplit | str, window: int) -> Iterator[np.ndarray]:
    """int64 [B, T] of held-out text, or of random ids where there is none."""
    longest = min(window, model.config.max_position_embeddings)
    draw = np.random.default_rng(0)
    for number, (batch, sequence) in enumerate(SHAPES):
        shape = (batch, min(sequence or longest, longest))
        count = shape[0] * shape[1]
        if isinstance(split, str):
            yield draw.integers(0, model.config.vocab_size, shape)
        else:
            start = number * max(0, len(split) - count) // len(SHAPES)
            found = np.resize(split.tokens[start : start + count], count)
            yield found.astype(np.int64).reshape(shape)


def run(session: Any, model: Model, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V]; a graph with a cache reads the ids in two parts, to use it."""
    names = [item.name for item in session.get_inputs()[1:]]
    if not names:
        return session.run(["logits"], {"input_ids": ids})[0]
    config = model.config
    empty = np.zeros((len(ids), config.num_key_value_heads, 0, config.head_dim), dtype=np.float32)
    past: dict[str, np.ndarray] = dict.fromkeys(names, empty)
    cut = ids.shape[1] // 2
    logits = []
    for part in (ids[:, :cut], ids[:, cut:]):
        if part.shape[1]:
            found, *present = session.run(None, {"input_ids": part, **past})
            past = dict(zip(names, present, strict=True))
            logits.append(found)
    return np.concatenate(logits, axis=1)
