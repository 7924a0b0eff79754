"""``thimble quantize``: the fewest bits with which a checkpoint still passes the gate.

The gate: perplexity on the test split rises by less than 2 %, and the tensors have the size that
their shapes imply. Calibration text is the validation split's. Where four bits fail, the ladder
goes on: more calibration text, eight bits for attention, eight bits for all.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thimble import artifacts
from thimble.config.load import CONFIG_FILE, load_run
from thimble.console import log, progress
from thimble.errors import ConfigError, DataError
from thimble.evaluation.perplexity import evaluate_model, held_out
from thimble.generation.model import Model, load
from thimble.models import interop
from thimble.models.causal_lm import CausalLM
from thimble.quantization import gptq, packed, summary
from thimble.tokens.shards import TokenSplit, check_tokenizer
from thimble.training import checkpoint

if TYPE_CHECKING:
    from rich.console import Console

KIND = "quantized"
SUMMARY = "quantization_summary.json"
MAX_RISE = 0.02
SIZE_TOLERANCE = 0.10
MIN_WINDOWS = 16
# Each rung reads the test split once; of a larger one whole documents of so many tokens.
MAX_TEST_TOKENS = 1 << 20


@dataclass(frozen=True)
class Rung:
    """One attempt. ``rise`` is a share (0.02: two per cent); sizes are bytes of all tensors."""

    name: str
    bits: dict[str, int]  # of "attention" and "mlp"
    calibration_windows: int
    perplexity_before: float
    perplexity: float
    rise: float
    bytes_expected: int
    bytes: int
    seconds: float
    passed: bool
    verdict: str


@dataclass(frozen=True)
class Quantization:
    """What ``quantize`` tried, and the last of it, which stands in the folder ``path``."""

    accepted: bool
    path: Path
    checkpoint: Path
    max_rise: float
    group_size: int
    sequence_length: int
    test_tokens: int
    rungs: list[Rung]
    unquantized: dict[str, Any]
    compression: dict[str, float]
    notes: list[str]
    created: str

    def to_dict(self) -> dict[str, Any]:
        return artifacts.plain(dataclasses.asdict(self))

    def render(self, console: Console) -> None:
        summary.render(self, console)


def quantize(
    path: str | Path,
    *,
    bits: int = 4,
    output: str | Path | None = None,
    calibration_samples: int = 512,
    device: str = "auto",
    max_rise: float = MAX_RISE,
) -> Quantization:
    """Quantize a checkpoint, or a run's best one, to int4 or int8 weights by GPTQ.

    Writes one folder that ``thimble.load`` and transformers load, with its summary, also where the
    last rung does not pass: ``accepted`` says so. ``calibration_samples``: windows of the
    validation split, twice as many from the second rung on. Raises ConfigError for other bits or
    too few samples; DataError when the checkpoint is damaged or not of a run of ours, when its
    tokens are not those it was trained on or too short, and when the folder exists;
    EnvironmentProblem when the extra is not installed.
    """
    if bits not in (4, 8):
        raise ConfigError(f"Weights can be quantized to 4 or 8 bits, not {bits}.")
    if calibration_samples < MIN_WINDOWS:
        raise ConfigError(
            f"{calibration_samples} calibration samples are too few to go by; give at least "
            f"{MIN_WINDOWS}."
        )
    directory = checkpoint.resolve(path)
    manifest = artifacts.read_manifest(directory, checkpoint.KIND, make=checkpoint.MAKE)
    if damage := artifacts.damaged_files(directory, manifest, hashes=True):
        raise DataError(f"{directory} is damaged: {'; '.join(damage)}. Quantize another one.")
    interop.refuse_own(directory, "GPTQ's calibration")
    rungs = _ladder(bits, calibration_samples)
    _free(output, directory, rungs[0][0])
    gptq.kernel()
    config = load_run(directory)
    length = config.training.sequence_length
    test = held_out(directory, manifest, config, "test")
    calibration = held_out(directory, manifest, config, "val")
    windows = _windows(calibration, length, rungs[-1][2], config.seed)
    model = load(directory, device)
    assert isinstance(model.network, CausalLM)
    check_tokenizer(test.manifest, model.tokenizer, directory)
    group = packed.group_size(model.config)
    notes = []
    if len(windows) < rungs[0][2]:
        notes.append(
            f"The validation split has only {len(windows)} windows of {length} tokens; all of them "
            f"are used in place of {rungs[0][2]}."
        )
        log.warning("%s", notes[-1])

    before = evaluate_model(model.nll, model, test, length, MAX_TEST_TOKENS)
    if not math.isfinite(before["perplexity"]):
        raise DataError(f"{directory} has no finite perplexity, so there is nothing to keep.")
    tried: list[Rung] = []
    for name, parts, samples in rungs:
        chosen = windows[:samples]
        if tried and (tried[-1].bits, tried[-1].calibration_windows) == (parts, len(chosen)):
            notes.append(f"No second attempt with {name}: there is no more validation text.")
            continue
        target = _free(output, directory, name)
        started = time.monotonic()
        what = f"{name}, {len(chosen)} windows"
        with progress(what, len(model.network.blocks), "blocks") as advance:
            tensors = gptq.quantize(model.network, chosen, parts, group, advance)
        data = _serialised(tensors)
        after = evaluate_model(_as_loaded(model, tensors).nll, model, test, length, MAX_TEST_TOKENS)
        tried.append(
            _judged(
                name,
                parts,
                len(chosen),
                before["perplexity"],
                after["perplexity"],
                packed.expected_bytes(model.config, parts, group),
                _tensor_bytes(data),
                time.monotonic() - started,
                max_rise,
            )
        )
        log.info("%s: %s", what, tried[-1].verdict)
        if tried[-1].passed:
            break
    last = tried[-1]
    parameters = model.network.num_parameters()
    result = Quantization(
        accepted=last.passed,
        path=target,
        checkpoint=directory,
        max_rise=max_rise,
        group_size=group,
        sequence_length=length,
        test_tokens=before["tokens"],
        rungs=tried,
        unquantized=_unquantized(model),
        compression={
            "float32": 4 * parameters / last.bytes,
            "float16": 2 * parameters / last.bytes,
        },
        notes=notes,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    _write(result, model, manifest, data)
    return result


def _ladder(bits: int, samples: int) -> list[tuple[str, dict[str, int], int]]:
    """Name, bits of each part and calibration windows of the rungs, in the order of trying."""
    whole = {n: {"attention": n, "mlp": n} for n in (4, 8)}
    if bits == 8:
        return [("int8", whole[8], samples)]
    return [
        ("int4", whole[4], samples),
        ("int4", whole[4], 2 * samples),
        ("int8-attention-int4-mlp", {"attention": 8, "mlp": 4}, 2 * samples),
        ("int8", whole[8], 2 * samples),
    ]


def _free(output: str | Path | None, directory: Path, name: str) -> Path:
    """The folder to write a rung into; DataError where it exists."""
    inside = directory.parent.name == "checkpoints"
    home = directory.parent.parent if inside else directory.parent
    target = Path(output) if output else home / "quantized" / f"{name}-{directory.name}"
    if target.exists() or target.is_symlink():
        raise DataError(f"{target} exists already. Remove it, or choose another folder with -o.")
    return target


def _windows(split: TokenSplit, length: int, most: int, seed: int) -> torch.Tensor:
    """Windows [N, T] drawn from a split's consecutive ones, at most ``most``.

    Raises DataError when there are too few to go by.
    """
    count = len(split) // length
    if count < MIN_WINDOWS:
        raise DataError(
            f"The validation split of {split.directory} has {len(split):,} tokens, {count} windows "
            f"of {length}; calibration wants at least {MIN_WINDOWS}. Add text to the corpus, build "
            "the tokens again and train on them."
        )
    order = np.random.default_rng(seed).permutation(count)[:most]
    table = np.asarray(split.tokens[: count * length]).reshape(count, length)
    return torch.from_numpy(table[order].astype(np.int64))


def _serialised(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(dict(tensors), metadata={"format": "pt"})


def _tensor_bytes(data: bytes) -> int:
    """Bytes of the tensors in a safetensors file: it begins with the length of its table."""
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def _as_loaded(model: Model, tensors: Mapping[str, torch.Tensor]) -> Model:
    network = copy.deepcopy(model.network)
    interop.load_native_tensors(network, packed.unpack(tensors, model.path), model.path)
    return Model(model.path, network, model.tokenizer, model.device)


def _judged(
    name: str,
    bits: dict[str, int],
    windows: int,
    before: float,
    after: float,
    expected: int,
    size: int,
    seconds: float,
    max_rise: float,
) -> Rung:
    rise = after / before - 1
    reasons = []
    if not rise < max_rise:  # NaN fails
        reasons.append(f"perplexity rises by {rise:.2%}, allowed is less than {max_rise:.2%}")
    if abs(size - expected) > SIZE_TOLERANCE * expected:
        reasons.append(f"{size:,} bytes where the shapes imply {expected:,}")
    verdict = "; ".join(reasons) or f"passed: perplexity {rise:+.2%}"
    return Rung(
        name, bits, windows, before, after, rise, expected, size, seconds, not reasons, verdict
    )


def _unquantized(model: Model) -> dict[str, Any]:
    config = model.config
    norms = sum(p.numel() for p in model.network.parameters() if p.dim() == 1)
    embedding = model.network.embedding.weight.numel()
    kept: dict[str, Any] = {
        "dtype": "float16",
        "embedding": embedding,
        "head": "the embedding" if config.tie_word_embeddings else embedding,
        "norms": norms,
    }
    heads = 1 if config.tie_word_embeddings else 2
    return kept | {"share": (heads * embedding + norms) / model.network.num_parameters()}


def _write(result: Quantization, model: Model, manifest: Mapping[str, Any], data: bytes) -> None:
    source, last = result.checkpoint, result.rungs[-1]
    native = artifacts.read_json(source / "config.json")
    native["quantization_config"] = packed.quantization_config(last.bits, result.group_size)
    with artifacts.atomic_directory(result.path) as folder:
        (folder / interop.WEIGHTS).write_bytes(data)
        artifacts.write_json(folder / "config.json", native)
        for name in ("generation_config.json", CONFIG_FILE):
            shutil.copyfile(source / name, folder / name)
        model.tokenizer.save(folder)
        artifacts.write_json(folder / SUMMARY, result.to_dict())
        artifacts.write_text(folder / summary.CARD, summary.card(result))
        artifacts.write_manifest(
            folder,
            KIND,
            inputs=dict(manifest["inputs"])
            | {
                "checkpoint": manifest["fingerprint"],
                "weights": manifest["files"][interop.WEIGHTS],
            },
            options=dict(manifest["options"])
            | {
                "bits": last.bits,
                "group_size": result.group_size,
                "calibration_windows": last.calibration_windows,
            },
            counts={"parameters": manifest["counts"]["parameters"], "bytes": last.bytes},
            packages=("torch", "neural-compressor-pt", "safetensors"),
            accepted=result.accepted,
        )
