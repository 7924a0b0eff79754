"""Checkpoints of recursive models: what is written is read, and anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_recursive import (
    EVERY,
    HRM_TEXT,
    MLP,
    WITH_PUZZLES,
    ids_of,
    model_of,
    puzzles_of,
    small,
)
from thimble.artifacts import write_json
from thimble.errors import DataError
from thimble.models import interop
from thimble.models.recursive import RecursiveLM

NO_TOKENIZER = {"bos": None, "eos": None, "pad": None}


def save(model: RecursiveLM, directory: Path) -> Path:
    write_json(directory / "config.json", interop.to_native_config(model.config, NO_TOKENIZER))
    tensors = interop.to_native_tensors(model)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / interop.WEIGHTS)
    return directory


def change(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config = {**config, **changes}
    write_json(directory / "config.json", {k: v for k, v in config.items() if v != "absent"})


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("changes", EVERY)
def test_what_is_written_is_read_to_the_bit(
    changes: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = model_of(small(**changes, tie_word_embeddings=tied))
    if model.puzzle_embedding is not None:
        model.puzzle_embedding.weight.normal_()
    read = interop.load_model(save(model, tmp_path))
    assert isinstance(read, RecursiveLM)
    assert read.config == model.config == interop.read_config(tmp_path)
    theirs, ours = read.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    ids, puzzles = ids_of(), puzzles_of(model.config)
    assert torch.equal(read(ids, puzzles_b=puzzles), model(ids, puzzles_b=puzzles))


def test_the_file_holds_the_model_s_own_names(tmp_path: Path) -> None:
    save(model_of(small(tie_word_embeddings=True)), tmp_path)
    names = set(load_file(tmp_path / interop.WEIGHTS))
    assert {"embedding.weight", "H_init", "L_init", "q_head.bias"} <= names
    assert "stacks.0.blocks.1.mlp.down.weight" in names
    assert not {"head.weight", "rope_2sc"} & names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "thimble_recursive"
    assert config["architectures"] == ["ThimbleRecursiveForCausalLM"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"H_cycles": "absent"}, "lacks H_cycles"),
        ({"H_cycle": 3}, r"unknown key H_cycle \(H_cycles\?\)"),
        ({"H_cycles": "three"}, "H_cycles: Input should be a valid integer"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"bp_cycles": 9}, "bp_cycles=9 is more"),
        ({"schedule": "once"}, "has schedule recursive"),
        ({"quantization_config": {"quant_method": "x"}}, "is quantized"),
        ({"model_type": "thimble_recursion"}, r"\(thimble_recursive\?\)"),
        ({"model_type": "llama"}, "lacks lm_head.weight"),
        ({"vocab_size": 62}, r"embedding.weight has shape \[61, 24\]"),
        ({"num_hidden_layers": 3}, "lacks stacks.0.blocks.2"),
        ({"separate_stacks": True}, "lacks stacks.1.blocks.0"),
        ({"single_z": True}, "unknown tensor L_init"),
        ({"attention_gate": True}, r"mixer.qkv.weight has shape \[48, 24\]"),
        (MLP, "mixer.mlp.down.weight"),
        (WITH_PUZZLES, "lacks puzzle_embedding.weight"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    change(save(model_of(small()), tmp_path), **changes)
    with pytest.raises(DataError, match=words) as caught:
        interop.load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_checkpoint_from_before_a_key_was_there_is_what_it_was(tmp_path: Path) -> None:
    model = model_of(small())
    change(save(model, tmp_path), position_embedding="absent", q_continue="absent")
    assert interop.load_model(tmp_path).config == model.config


def test_a_longer_model_of_an_mlp_mixer_is_refused(tmp_path: Path) -> None:
    change(save(model_of(small(**MLP)), tmp_path), max_position_embeddings=21)
    with pytest.raises(DataError, match="has shape"):
        interop.load_model(tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    weights = save(model_of(small(**HRM_TEXT)), tmp_path) / interop.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(DataError, match="damaged or cut off"):
        interop.load_model(tmp_path)
