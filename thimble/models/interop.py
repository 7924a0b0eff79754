"""Our model as a native transformers checkpoint, and such checkpoints as our model.

A plain attention model is a ``llama``, or a ``mistral`` where LlamaConfig refuses its shape (a
hidden size that the number of heads does not divide). Both have the same tensors. Recursive models
and retention have files of their own (``interop_recursive``, ``interop_retention``); an
``hrm_text`` is read as one (``interop_hrm_text``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thimble.artifacts import read_json
from thimble.config.model import ModelConfig
from thimble.console import log
from thimble.errors import ConfigError, DataError, nearest
from thimble.models import interop_hrm_text, interop_recursive, interop_retention
from thimble.models.causal_lm import Block, CausalLM
from thimble.models.recursive import RecursiveLM
from thimble.quantization import packed

NATIVE = ("llama", "mistral")
OWN = (interop_recursive.MODEL_TYPE, interop_retention.MODEL_TYPE)
READABLE = (*NATIVE, interop_hrm_text.MODEL_TYPE, *OWN)
WEIGHTS = "model.safetensors"
PICKLED = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth")


def to_native_config(config: ModelConfig, special: dict[str, int | None]) -> dict[str, Any]:
    """``config.json`` for transformers; ``special`` holds bos, eos and pad token ids."""
    if config.schedule == "recursive":
        return interop_recursive.to_config(config, special)
    if config.mixer == "retention":
        return interop_retention.to_config(config, special)
    llama = config.hidden_size % config.num_attention_heads == 0
    native: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if llama else "MistralForCausalLM"],
        "model_type": "llama" if llama else "mistral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        # transformers 5 reads rope_parameters; vLLM, llama.cpp and transformers 4 read rope_theta.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": "float32",
        "bos_token_id": special.get("bos"),
        "eos_token_id": special.get("eos"),
        "pad_token_id": special.get("pad"),
    }
    if llama:
        native |= {"attention_bias": False, "mlp_bias": False}
    else:
        native["sliding_window"] = None
    return native


def from_native_config(native: dict[str, Any], where: object) -> ModelConfig:
    """Our configuration of what ``READABLE`` names; DataError says what we could not reproduce."""
    kind = native.get("model_type")
    if kind == interop_recursive.MODEL_TYPE:
        return interop_recursive.from_config(native, where)
    if kind == interop_retention.MODEL_TYPE:
        return interop_retention.from_config(native, where)
    if kind == interop_hrm_text.MODEL_TYPE:
        return interop_hrm_text.from_config(native, where)
    if kind not in NATIVE:
        close = nearest(str(kind), READABLE)
        *first, last = READABLE
        raise DataError(
            f"{where} is a {kind or 'model of unknown type'}; thimble loads {', '.join(first)} and "
            f"{last} checkpoints{f' ({close}?)' if close else ''}. Load it with transformers "
            "instead."
        )
    packed.check(native.get("quantization_config"), where)
    rope = native.get("rope_parameters") or native.get("rope_scaling") or {}
    window = native.get("sliding_window")
    context = native.get("max_position_embeddings", 0)
    unsupported = {
        "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
        "hidden_act": native.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(native.get("attention_bias")),
        "mlp_bias": bool(native.get("mlp_bias")),
        "sliding_window": window is not None and window < context,
    }
    if any(unsupported.values()):
        names = ", ".join(name for name, wrong in unsupported.items() if wrong)
        raise DataError(f"{where} uses a setting of {names} that thimble's model does not have.")
    try:
        heads, hidden = native["num_attention_heads"], native["hidden_size"]
        return ModelConfig(
            vocab_size=native["vocab_size"],
            hidden_size=hidden,
            intermediate_size=native["intermediate_size"],
            num_hidden_layers=native["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=native.get("num_key_value_heads") or heads,
            head_dim=native.get("head_dim") or hidden // heads,
            max_position_embeddings=context,
            rope_theta=float(rope.get("rope_theta", native.get("rope_theta", 10000.0))),
            rms_norm_eps=float(native.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(native.get("tie_word_embeddings", False)),
            initializer_range=float(native.get("initializer_range", 0.02)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is not a usable configuration: {error}") from error


def to_native_tensors(model: CausalLM | RecursiveLM) -> dict[str, Tensor]:
    """transformers' names -> tensors (views); a tied head is left out, as transformers does."""
    config = model.config
    if isinstance(model, RecursiveLM) or config.mixer == "retention":
        return interop_recursive.to_tensors(model)
    size = config.head_dim
    heads, kv_heads = config.num_attention_heads * size, config.num_key_value_heads * size
    tensors = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
    }
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.head.weight
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        q, k, v = block.mixer.qkv.weight.split([heads, kv_heads, kv_heads])
        gate, up = block.mlp.gate_up.weight.chunk(2)
        layer = {
            "input_layernorm": block.mixer_norm.weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.mixer.output.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.mlp.down.weight,
        }
        tensors |= {f"model.layers.{index}.{name}.weight": t for name, t in layer.items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


@torch.no_grad()
def load_native_tensors(
    model: CausalLM | RecursiveLM, tensors: dict[str, Tensor], where: object
) -> None:
    """Copy transformers' tensors into the model; every tensor must be there, in shape, and used."""
    slots, given = to_native_tensors(model), dict(tensors)
    if isinstance(model, RecursiveLM):
        if interop_hrm_text.INIT in tensors and not interop_hrm_text.differences(model.config):
            slots = interop_hrm_text.to_tensors(model)
            interop_hrm_text.clear_rest(model)
        else:
            given = interop_recursive.own_names(tensors)
    elif model.config.mixer == "retention":
        given = interop_recursive.own_names(tensors)
    if model.config.tie_word_embeddings:
        for name in ("lm_head.weight", "head.weight"):
            given.pop(name, None)
    missing, extra = sorted(slots.keys() - given.keys()), sorted(given.keys() - slots.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has the unknown tensor {extra[0]}"
        count = len(missing) + len(extra)
        raise DataError(
            f"{where} does not fit its config.json: it {what} ({count} such names in all)."
        )
    for name, slot in slots.items():
        if slot.shape != given[name].shape:
            raise DataError(
                f"{where}: {name} has shape {list(given[name].shape)}, "
                f"config.json implies {list(slot.shape)}."
            )
        slot.copy_(given[name])


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration of a checkpoint directory, ours or transformers'."""
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"There is no checkpoint at {directory}.")
    if not (directory / "config.json").is_file():
        raise DataError(
            f"{directory} holds no config.json, so it is not a checkpoint. A run's checkpoints are "
            "in its folder checkpoints/; the run folder itself can be given, too."
        )
    return from_native_config(read_json(directory / "config.json"), directory / "config.json")


def refuse_own(directory: Path, what: str) -> None:
    """Raise ConfigError when the checkpoint is of a recursive model or of retention, which ``what``
    cannot run."""
    config = read_config(directory)
    if config.schedule == "recursive":
        use = "export transformers -o FOLDER" if config.causal else "evaluate"
        raise ConfigError(
            f"{directory} holds a recursive model, whose stack runs in cycles; {what} runs a stack "
            f"once. What there is for it:\n  thimble {use} {directory}"
        )
    if config.mixer == "retention":
        raise ConfigError(
            f"{directory} holds a model of retention, and {what} knows attention only. What there "
            f"is for it:\n  thimble export transformers {directory} -o FOLDER"
        )


def new_model(config: ModelConfig) -> CausalLM | RecursiveLM:
    """The model of a configuration, with weights that nobody has set."""
    return RecursiveLM(config) if config.schedule == "recursive" else CausalLM(config)


def load_model(directory: str | Path, device: torch.device | str = "cpu") -> CausalLM | RecursiveLM:
    """Load ``config.json`` and safetensors (one file or shards) into a float32 model on ``device``.

    Quantized weights (``quantization.packed``) become the float32 numbers they stand for.
    Nothing is unpickled: a directory with only a pickled file is refused with what to do.
    """
    directory = Path(directory)
    model = new_model(read_config(directory))
    native = read_json(directory / "config.json")
    if native["model_type"] == interop_hrm_text.MODEL_TYPE:
        for remark in interop_hrm_text.remarks(native):
            log.warning("%s: %s.", directory, remark)
    tensors = packed.unpack(read_tensors(directory), directory)
    load_native_tensors(model, tensors, directory)
    return model.to(device)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory's safetensors file or shards."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = directory / f"{WEIGHTS}.index.json"
    if (directory / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif index.is_file():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
        outside = [name for name in files if Path(name).name != name]
        if outside:
            raise DataError(f"{index} points outside its folder: {outside[0]}.")
    else:
        pickled = [name for name in PICKLED if (directory / name).exists()]
        if pickled:
            raise DataError(
                f"{directory} holds its weights as {pickled[0]}, a pickle, which can run code when "
                "it is opened; thimble does not. If you trust it, convert it with transformers: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
            )
        raise DataError(f"{directory} has no {WEIGHTS}; the checkpoint is incomplete.")
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            tensors |= load_file(directory / name)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise DataError(f"{directory / name} is damaged or cut off: {error}") from error
    return tensors
