"""transformers' ``hrm_text`` (HRM-Text, arXiv:2605.20613) as our recursive model, and back.

It has separate stacks of pre-norm blocks with gated attention; z_H begins as the input, and there
is one supervision step. Logits are equal. Two things are not carried over, neither of which changes
causal logits:

- ``prefix_lm``: transformers lets a prompt marked by ``token_type_ids`` see itself in both
  directions. Ours reads it causally, as transformers does without ``token_type_ids``.
- ``L_bp_cycles``: how many updates of z_L get gradients in each H cycle, in training only. Ours
  always go through all of them when the input is not injected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thimble.config.model import ModelConfig
from thimble.errors import DataError
from thimble.models.attention import Attention
from thimble.models.recursive import RecursiveBlock, RecursiveLM, Stack

MODEL_TYPE = "hrm_text"
INIT = "model.z_L_init"
# What its architecture is, in our keys.
FIXED: dict[str, Any] = {
    "mixer": "attention",
    "causal": True,
    "separate_stacks": True,
    "single_z": False,
    "pre_norm": True,
    "attention_gate": True,
    "inject_input": False,
    "halt_max_steps": 1,
    "position_embedding": "rope",
    "puzzle_identifiers": 0,
}


def differences(config: ModelConfig) -> list[str]:
    """What keeps a recursive configuration from being an ``hrm_text``; empty when it is one."""
    heads = config.num_attention_heads
    wanted = FIXED | {"num_key_value_heads": heads}
    found = [
        f"model.{key} is {getattr(config, key)}, not {value}"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]
    if config.hidden_size % heads:
        found.append(f"model.hidden_size={config.hidden_size} is not a multiple of {heads} heads")
    return found


def to_config(config: ModelConfig, special: Mapping[str, int | None]) -> dict[str, Any]:
    """``config.json`` of a configuration without ``differences``."""
    layers, calls = config.num_hidden_layers, config.H_cycles * (config.L_cycles + 1)
    return {
        "architectures": ["HrmTextForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        # transformers counts the blocks of all calls, each of which has a place in its cache.
        "num_hidden_layers": layers * calls,
        "num_layers_per_stack": layers,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "embedding_scale": config.embedding_scale or config.hidden_size**0.5,
        "H_cycles": config.H_cycles,
        "L_cycles": config.L_cycles,
        "L_bp_cycles": [config.L_cycles] * config.H_cycles,
        "prefix_lm": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": "float32",
        "bos_token_id": special.get("bos"),
        "eos_token_id": special.get("eos"),
        "pad_token_id": special.get("pad"),
    }


def from_config(native: Mapping[str, Any], where: object) -> ModelConfig:
    """The configuration in ``config.json``; DataError names whatever we could not reproduce."""
    rope = native.get("rope_parameters") or native.get("rope_scaling") or {}
    unsupported = {
        "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
        "hidden_act": native.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(native.get("attention_bias")),
        "mlp_bias": bool(native.get("mlp_bias")),
        "quantization_config": bool(native.get("quantization_config")),
    }
    if any(unsupported.values()):
        names = ", ".join(name for name, wrong in unsupported.items() if wrong)
        raise DataError(f"{where} uses a setting of {names} that thimble's model does not have.")
    try:
        heads, deviation = native["num_attention_heads"], native.get("initializer_range", 0.02)
        cycles = native.get("H_cycles", 2)
        return ModelConfig(
            **FIXED,
            schedule="recursive",
            vocab_size=native["vocab_size"],
            hidden_size=native["hidden_size"],
            intermediate_size=native["intermediate_size"],
            num_hidden_layers=native.get("num_layers_per_stack") or native["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=native.get("head_dim", 128),
            max_position_embeddings=native.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta", native.get("rope_theta", 10000.0))),
            rms_norm_eps=float(native.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(native.get("tie_word_embeddings", False)),
            initializer_range=float(deviation),
            embedding_scale=float(native.get("embedding_scale") or 1 / deviation),
            H_cycles=cycles,
            L_cycles=native.get("L_cycles", 3),
            bp_cycles=cycles,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{where} is not a usable configuration: {error}") from error


def remarks(native: Mapping[str, Any]) -> list[str]:
    """What a checkpoint has that is not carried over (see above)."""
    found = []
    if native.get("prefix_lm", True):
        found.append(
            "it was trained with prompts that see themselves in both directions (prefix_lm), and "
            "is read causally here, as by transformers without token_type_ids"
        )
    cycles, updates = native.get("H_cycles", 2), native.get("L_cycles", 3)
    given = native.get("L_bp_cycles") or [2]
    routed = ([1] * max(0, cycles - len(given)) + list(given))[:cycles]
    if any(number < updates for number in routed):
        found.append(
            f"if it is trained here, gradients go through every update of z_L, not through the "
            f"last {', '.join(map(str, routed))} of each H cycle (L_bp_cycles)"
        )
    return found


def to_tensors(model: RecursiveLM) -> dict[str, Tensor]:
    """Names in transformers' files -> tensors (views); a tied head is left out.

    The halting head has no place there: with one step it never decides anything.
    """
    tensors = {"model.embed_tokens.weight": model.embedding.weight, INIT: model.L_init}
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.head.weight
    for letter, stack in zip("LH", model.stacks, strict=True):
        assert isinstance(stack, Stack)
        for index, block in enumerate(stack.blocks):
            assert isinstance(block, RecursiveBlock)
            assert isinstance(block.mixer, Attention)
            layer = {
                "attn.gqkv_proj": block.mixer.qkv,
                "attn.o_proj": block.mixer.output,
                "mlp.gate_up_proj": block.mlp.gate_up,
                "mlp.down_proj": block.mlp.down,
            }
            prefix = f"model.{letter}_module.layers.{index}"
            tensors |= {f"{prefix}.{name}.weight": part.weight for name, part in layer.items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


@torch.no_grad()
def clear_rest(model: RecursiveLM) -> None:
    """Set what such a file does not hold as in a new model; nothing reads it."""
    model.H_init.zero_()
    model.q_head.weight.zero_()
    model.q_head.bias.fill_(-5.0)
