"""A checkpoint as one GGUF file for llama.cpp: weights, configuration and tokenizer.

The file is of llama.cpp's architecture ``llama``, which covers llama and mistral checkpoints. It
rotates neighbouring channels of a head where transformers rotates its two halves, so the rows of
the query and key matrices change places. K-quants are made by llama.cpp itself.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from thimble import artifacts
from thimble.config.load import Misspelt
from thimble.console import log
from thimble.errors import DataError, nearest
from thimble.export import deployment, llama_cpp
from thimble.export.deployment import Export
from thimble.export.gguf_tokenizer import Vocabulary, vocabulary_of
from thimble.generation import model as generation
from thimble.models import interop

if TYPE_CHECKING:
    from thimble.config.model import ModelConfig

WRITTEN = ("F16", "F32", "Q8_0")  # by the package gguf
K_QUANTS = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K")  # by llama.cpp
TYPES = WRITTEN + K_QUANTS
EXACT = ("F16", "F32")  # must decide as the checkpoint does
BLOCK, SUPER_BLOCK = 32, 256  # weights that share a scale: of Q8_0 and its like, and of K-quants

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export(
    path: str | Path,
    *,
    type: str = "F16",
    output: str | Path | None = None,
    tokens: str | Path | None = None,
) -> Export:
    """Write a run's best checkpoint, or the one given, as GGUF, check it, and describe it.

    ``type`` is one of ``TYPES``, ``tokens`` a tokens folder for the checks in place of the run's.
    With llama-cpp-python installed llama.cpp loads the file before it gets its name. Raises
    ConfigError for an unknown type; DataError when the checkpoint, its tokenizer or its shape does
    not fit, or the target exists; NotAccepted when llama.cpp does not do what the model does;
    EnvironmentProblem when a package is missing.
    """
    type = check_type(type)
    source = deployment.find_source(path)
    interop.refuse_own(source.checkpoint, "llama.cpp")
    target = deployment.choose_target(source, output, f"-{type}.gguf")
    model = generation.load(source.checkpoint, device="cpu")
    split = deployment.held_out(source, tokens, model.tokenizer)
    warnings = check_shapes(model.config, type)
    native = artifacts.read_json(source.checkpoint / "config.json")
    vocabulary = vocabulary_of(model.tokenizer, model.config.vocab_size, native, source.checkpoint)
    with deployment.file_and_manifest(target) as (file, manifest):
        tensors = to_gguf_tensors(interop.to_native_tensors(model.network), model.config)
        write(file, source.name, model.config, vocabulary, tensors, type)
        if llama_cpp.available():
            log.info("checking the %s with llama.cpp", type)
            window = deployment.window_length(source, model.config)
            checks, speed = llama_cpp.check(file, model, split, window, exact=type in EXACT)
        else:
            unchecked = "not checked: install thimble-lm[gguf]"
            checks, speed = {"result": unchecked, "warnings": [unchecked]}, {"result": unchecked}
        warnings += checks.pop("warnings")
        facts = deployment.describe(
            source,
            model.config,
            file,
            name=target.name,
            type=type,
            tensor_types=tensor_types(file),
            checks=checks,
            speed=speed,
            warnings=warnings,
            packages=("gguf", "llama-cpp-python"),
        )
        artifacts.write_json(manifest, facts)
    return Export(target, deployment.manifest_path(target), facts)


def check_type(type: str) -> str:
    """The type as llama.cpp spells it; what it takes to make it must be installed."""
    known = type.upper()
    if known not in TYPES:
        raise Misspelt(
            f"There is no GGUF type {type} here.",
            type,
            nearest(known, TYPES),
            f"Known: {', '.join(TYPES)}.",
        )
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise deployment.missing_extra("Writing GGUF needs the package gguf", "gguf") from error
    if known in K_QUANTS and not llama_cpp.available():
        raise deployment.missing_extra(f"{known} is made by llama.cpp, which is missing", "gguf")
    return known


def check_shapes(config: ModelConfig, type: str) -> list[str]:
    """Warnings about a shape that ``type`` takes only in part.

    Raises DataError when it does not take it: a row must consist of whole blocks.
    """
    if type in EXACT:
        return []
    heads = config.num_attention_heads * config.head_dim
    embeddings = ["token_embd"] if config.tie_word_embeddings else ["token_embd", "output"]
    inner = ["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"]
    rows = dict.fromkeys(embeddings, config.hidden_size)
    rows |= {f"blk.*.{name}": config.hidden_size for name in inner}
    rows |= {"blk.*.attn_output": heads, "blk.*.ffn_down": config.intermediate_size}
    if odd := {name: length for name, length in rows.items() if length % BLOCK}:
        lines = "".join(f"\n  {name}.weight: rows of {n:,}" for name, n in odd.items())
        raise DataError(
            f"{type} needs rows of a multiple of {BLOCK} weights, and these are not:{lines}\n"
            "Export it as F16, or train a model whose widths are such multiples."
        )
    falling = {name: length for name, length in rows.items() if length % SUPER_BLOCK}
    if type not in K_QUANTS or not falling:
        return []
    named = ", ".join(f"{name} (rows of {length:,})" for name, length in falling.items())
    return [
        f"{type} keeps {SUPER_BLOCK} weights together, so llama.cpp stores these tensors in a type "
        f"with blocks of {BLOCK} and more bits instead: {named}"
    ]


def to_gguf_tensors(native: dict[str, Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """llama.cpp's names -> float32 arrays, query and key rows in the order of its rotation."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, tensor in native.items():
        array = tensor.float().cpu().numpy()
        stem = name.removesuffix(".weight")
        prefix = ""
        if layer := re.match(r"model\.layers\.(\d+)\.", stem):
            prefix, stem = f"blk.{layer[1]}.", stem[layer.end() :]
        if count := heads.get(stem.rpartition(".")[2]):
            array = interleave(array, count)
        found[f"{prefix}{NAMES[stem]}.weight"] = array
    return found


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """[H*C, D] with channel i of a head rotated against i + C/2 -> 2i against 2i + 1."""
    total, width = rows.shape
    return rows.reshape(heads, 2, total // heads // 2, width).swapaxes(1, 2).reshape(total, width)


def write(
    file: Path,
    name: str,
    config: ModelConfig,
    vocabulary: Vocabulary,
    tensors: dict[str, np.ndarray],
    type: str,
) -> None:
    """Write the whole file as ``type``; K-quants by way of a temporary F32 file beside it."""
    if type not in K_QUANTS:
        return _write(file, name, config, vocabulary, tensors, type)
    with tempfile.TemporaryDirectory(prefix=artifacts.TEMPORARY, dir=file.parent) as folder:
        whole = Path(folder) / "F32.gguf"
        _write(whole, name, config, vocabulary, tensors, "F32")
        return llama_cpp.quantize(whole, file, type)


def _write(
    file: Path,
    name: str,
    config: ModelConfig,
    vocabulary: Vocabulary,
    tensors: dict[str, np.ndarray],
    type: str,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    try:
        writer.add_name(name)
        writer.add_file_type(
            gguf.LlamaFileType["ALL_F32" if type == "F32" else f"MOSTLY_{type}"].value
        )
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        # Without these llama.cpp takes hidden size / heads, which is not what a head is here.
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        vocabulary.add_to(writer)
        for key, array in tensors.items():
            # As llama.cpp does it: vectors, here the norms, stay as they are.
            stored, dtype = pack(key, array, type if array.ndim > 1 else "F32")
            writer.add_tensor(key, stored, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def pack(name: str, array: np.ndarray, type: str) -> tuple[np.ndarray, Any]:
    """An array as it is stored, and the format's number for that."""
    import gguf

    kind = gguf.GGMLQuantizationType[type]
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(array).max()
        if not largest <= (np.finfo(np.float16).max if type != "F32" else np.finfo("f4").max):
            raise DataError(
                f"{name} holds {largest}, which is beyond {type}. "
                + ("Export it as F32." if np.isfinite(largest) else "The checkpoint is broken.")
            )
    if type == "Q8_0":
        return gguf.quantize(np.ascontiguousarray(array), kind), kind
    stored = array.astype(np.float16 if type == "F16" else np.float32)
    return np.ascontiguousarray(stored), kind


def tensor_types(file: Path) -> dict[str, int]:
    """How many tensors of a GGUF file have which type."""
    from gguf import GGUFReader

    counts: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return dict(sorted(counts.items()))
