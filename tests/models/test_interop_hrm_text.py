"""transformers' HRM-Text and ours are one model: the same logits, the same words, both ways."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, HrmTextConfig, HrmTextForCausalLM

from tests.models.test_recursive import CAUSAL, HRM_TEXT, ids_of, model_of, small
from thimble.artifacts import write_json
from thimble.errors import DataError
from thimble.generation.sampling import generate_ids
from thimble.models import interop, interop_hrm_text
from thimble.models.recursive import RecursiveLM

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,  # so that blocks change what goes through them
}
# Random enough that every choice is seen: cycles, width of heads, norms, scales, tied heads.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"H_cycles": 1, "L_cycles": 1, "num_hidden_layers": 1},
    {"H_cycles": 3, "L_cycles": 2, "head_dim": 10, "rms_norm_eps": 1e-2},
    {"tie_word_embeddings": True, "embedding_scale": 3.5},
    {"initializer_range": 0.2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"prefix_lm": False, "L_bp_cycles": [3, 3]},
]


def theirs_of(directory: Path, **changes: Any) -> HrmTextForCausalLM:
    """A model of transformers, saved to the directory."""
    torch.manual_seed(len(str(changes)))
    model = HrmTextForCausalLM(HrmTextConfig(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        model.model.z_L_init.normal_()
    model.save_pretrained(directory)
    return model


def greedy(model: RecursiveLM, ids: torch.Tensor, count: int = 10) -> list[int]:
    options = {"max_tokens": count, "temperature": 0, "top_k": 0, "top_p": 1, "seed": 0}
    return list(generate_ids(model, ids[0].tolist(), **options))


def greedy_of_theirs(model: Any, ids: torch.Tensor, count: int = 10) -> list[int]:
    whole = torch.ones_like(ids)
    options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    return model.generate(ids, attention_mask=whole, **options)[0, ids.shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS)
def test_theirs_is_read_with_the_same_logits(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = theirs_of(tmp_path, **changes)
    ours = interop.load_model(tmp_path)
    assert isinstance(ours, RecursiveLM)
    ids = ids_of(2, 40)
    logits = theirs(ids).logits
    assert logits.std() > 0.5
    torch.testing.assert_close(ours(ids), logits, atol=1e-5, rtol=1e-5)
    state, parts = ours.new_state(2), ids.split([30, 5, *[1] * 5], 1)
    cached = torch.cat([ours(part, state) for part in parts], 1)
    torch.testing.assert_close(cached, logits, atol=1e-5, rtol=1e-5)
    assert greedy(ours, ids[:1]) == greedy_of_theirs(theirs, ids[:1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("tied", "scale", "cycles"), itertools.product([True, False], [None, 7.0], [1, 2])
)
def test_ours_is_written_with_the_same_logits(
    tied: bool, scale: float | None, cycles: int, tmp_path: Path
) -> None:
    changes = {"tie_word_embeddings": tied, "embedding_scale": scale, "num_key_value_heads": 4}
    config = small(**{**HRM_TEXT, **changes, "H_cycles": cycles, "bp_cycles": cycles})
    assert not interop_hrm_text.differences(config)
    ours = model_of(config)
    special = {"bos": 3, "eos": 4, "pad": None}
    write_json(tmp_path / "config.json", interop_hrm_text.to_config(config, special))
    from safetensors.torch import save_file

    tensors = interop_hrm_text.to_tensors(ours)
    metadata = {"format": "pt"}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / interop.WEIGHTS, metadata)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, HrmTextForCausalLM)
    assert not any(report.values()), report
    ids = ids_of(2, 20)
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)
    assert greedy_of_theirs(theirs, ids[:1, :9]) == greedy(ours, ids[:1, :9])
    # and back again, to the bit
    again = interop.load_model(tmp_path)
    wanted = config.model_copy(update={"embedding_scale": scale or 24**0.5})
    assert again.config == wanted
    assert torch.equal(again(ids), ours(ids)) or scale is None
    torch.testing.assert_close(again(ids), ours(ids), atol=1e-6, rtol=1e-6)


def test_gradients_are_theirs_when_they_go_through_everything(tmp_path: Path) -> None:
    theirs = theirs_of(tmp_path, L_bp_cycles=[3, 3], prefix_lm=False)
    ours = interop.load_model(tmp_path)
    ids = ids_of(2, 20)
    for logits in (ours(ids), theirs(ids).logits):
        logits.logsumexp(-1).sum().backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    parts = [f"model.L_module.layers.1.self_attn.{x}_proj.weight" for x in ("gate", "q", "k", "v")]
    gradient = ours.stacks[0].blocks[1].mixer.qkv.weight.grad
    joined = torch.cat([wanted[name] for name in parts])
    torch.testing.assert_close(gradient, joined, atol=1e-5, rtol=1e-4)
    embedding = wanted["model.embed_tokens.weight"]
    torch.testing.assert_close(ours.embedding.weight.grad, embedding, atol=1e-4, rtol=1e-4)


def test_what_is_not_carried_over_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs_of(tmp_path)
    with caplog.at_level(logging.WARNING, "thimble"):
        interop.load_model(tmp_path)
    assert "prefix_lm" in caplog.text
    assert "last 1, 2 of each H cycle" in caplog.text
    caplog.clear()
    theirs_of(tmp_path, prefix_lm=False, L_bp_cycles=[3, 3])
    with caplog.at_level(logging.WARNING, "thimble"):
        interop.load_model(tmp_path)
    assert not caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"H_cycles": 0}, "not a usable configuration"),
        ({"vocab_size": 62}, "has shape"),
        ({"num_layers_per_stack": 3}, "lacks model.H_module.layers.2"),
    ],
)
def test_what_ours_has_not_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    theirs_of(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, **changes})
    with pytest.raises(DataError, match=words):
        interop.load_model(tmp_path)


@torch.no_grad()
def test_a_file_that_counts_blocks_of_one_stack_is_read(tmp_path: Path) -> None:
    theirs = theirs_of(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config.pop("num_layers_per_stack"), config["num_hidden_layers"]) == (2, 16)
    write_json(tmp_path / "config.json", {**config, "num_hidden_layers": 2})
    ids = ids_of()
    torch.testing.assert_close(interop.load_model(tmp_path)(ids), theirs(ids).logits)


def test_the_tensors_do_not_make_the_architecture(tmp_path: Path) -> None:
    theirs_of(tmp_path)
    config = interop.to_native_config(small(), {})
    write_json(tmp_path / "config.json", config)
    with pytest.raises(DataError, match=r"does not fit its config\.json"):
        interop.load_model(tmp_path)


@pytest.mark.parametrize("changes", CAUSAL)
def test_differences_are_named(changes: dict[str, Any], tmp_path: Path) -> None:
    found = interop_hrm_text.differences(small(**changes))
    assert found  # two key heads for four, if nothing else
    kind = changes.get("position_embedding", "rope")
    assert (f"model.position_embedding is {kind}, not rope" in found) is (kind != "rope")
    if changes is HRM_TEXT:
        assert found == ["model.num_key_value_heads is 2, not 4"]
    else:
        assert any("model.pre_norm is False, not True" in line for line in found)
