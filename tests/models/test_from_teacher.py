"""A student that begins with a teacher's weights has its parts, and is nearer to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests import helpers_distill, helpers_recursion
from tests.helpers_distill import config
from tests.helpers_training import trainer
from thimble.config.model import ModelConfig
from thimble.errors import ConfigError, DataError
from thimble.models.causal_lm import CausalLM
from thimble.models.from_teacher import OPEN, begin, directions, layers, measure, pairs
from thimble.training import train

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def teacher(**changes: Any) -> CausalLM:
    """With weights large enough to matter, and an input that is not zero on average."""
    model = CausalLM(ModelConfig(**SMALL | changes)).initialize(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
            if name == "embedding.weight":
                parameter += torch.randn(parameter.shape[1], generator=generator) * 0.3
    return model


def student(**changes: Any) -> CausalLM:
    own = {"mixer": "retention", "num_key_value_heads": 4, "retention_horizons": [4, 64]}
    if "num_attention_heads" in changes:
        own["num_key_value_heads"] = changes["num_attention_heads"]
    drawn = torch.Generator().manual_seed(5)
    return CausalLM(ModelConfig(**SMALL | own | changes)).initialize(drawn)


def ids_of(rows: int = 16, time: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 60, (rows, time), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_of_the_same_size_everything_but_the_mixing_is_the_teachers() -> None:
    wise, young = teacher(), student()
    begin(young, wise, ids_of())
    assert torch.equal(young.embedding.weight, wise.embedding.weight)
    assert torch.equal(young.norm.weight, wise.norm.weight)
    for mine, theirs in zip(young.blocks, wise.blocks, strict=True):
        a, b = mine.state_dict(), theirs.state_dict()
        for name in ("mixer_norm.weight", "mlp_norm.weight", "mlp.down.weight"):
            assert torch.equal(a[name], b[name])
        assert torch.equal(a["mlp.gate_up.weight"], b["mlp.gate_up.weight"])
        qkvg, qkv = a["mixer.qkvg.weight"], b["mixer.qkv.weight"]
        # Two heads share keys and values in the teacher.
        shared = qkv[32:].unflatten(0, (2, 2, 8)).repeat_interleave(2, 1).flatten(0, 2)
        copied = torch.cat([qkv[:32], shared]).unflatten(0, (12, 8))
        own = qkvg[:96].unflatten(0, (12, 8))
        assert torch.equal(own[8:], copied[8:])  # values
        fast = [0, 1, 2, 4, 5, 6]  # of the slowest pair there is a constant
        assert torch.equal(own[:8, fast], copied[:8, fast])


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 24}, {"hidden_size": 40}])
@pytest.mark.parametrize("scale", [1, -1, 0])
def test_the_gate_begins_nearly_constant_for_any_scale_of_the_norm(
    scale: float, changes: dict[str, Any]
) -> None:
    wise, young = teacher(), student(**changes)
    blocks: Any = wise.blocks
    for block in blocks:
        block.mixer_norm.weight[:4] *= scale
    begin(young, wise, ids_of())
    mine: Any = young.blocks[0]
    x = mine.mixer_norm(F.embedding(ids_of(seed=9), young.embedding.weight))
    gate = F.linear(x, mine.mixer.qkvg.weight[-32:])
    assert gate.mean().item() == pytest.approx(OPEN, rel=0.1)
    assert gate.std() < 0.1 * OPEN


@torch.no_grad()
def test_the_gate_begins_nearly_constant_and_heads_in_their_size() -> None:
    wise, young = teacher(), student()
    begin(young, wise, ids_of())
    ids = ids_of(seed=9)  # not the text it was measured on
    x = F.embedding(ids, young.embedding.weight)
    block: Any = young.blocks[0]
    gate = F.linear(block.mixer_norm(x), block.mixer.qkvg.weight[-32:])
    assert gate.mean().item() == pytest.approx(OPEN, rel=0.1)
    assert gate.std() < 0.5 * OPEN
    rope = young.rope_2tc[:, : ids.shape[1]]
    own = block.mixer(block.mixer_norm(x), rope)[0]
    theirs: Any = wise.blocks[0]
    other = theirs.mixer(theirs.mixer_norm(x), rope)[0]
    assert own.square().mean().sqrt().item() == pytest.approx(
        other.square().mean().sqrt().item(), rel=0.5
    )


SIZES = [
    pytest.param({}, id="same"),
    pytest.param({"hidden_size": 24}, id="narrower"),
    pytest.param({"hidden_size": 40, "intermediate_size": 64}, id="wider"),
    pytest.param({"num_hidden_layers": 2, "intermediate_size": 40}, id="shallower"),
    pytest.param({"num_hidden_layers": 5}, id="deeper"),
    pytest.param({"num_attention_heads": 2, "head_dim": 16}, id="few wide heads"),
    pytest.param({"num_attention_heads": 6, "head_dim": 4}, id="many narrow heads"),
    pytest.param({"value_head_dim": 16}, id="wide values"),
    pytest.param({"value_head_dim": 4, "tie_word_embeddings": False}, id="narrow values, untied"),
]


@torch.no_grad()
@pytest.mark.parametrize("changes", SIZES)
def test_any_size_begins_nearer_to_its_teacher(changes: dict[str, Any]) -> None:
    tied = changes.get("tie_word_embeddings", True)
    wise, young = teacher(tie_word_embeddings=tied), student(**changes)
    ids = ids_of(seed=9)
    p = wise(ids).log_softmax(-1)

    def away(model: CausalLM) -> float:
        return (p.exp() * (p - model(ids).log_softmax(-1))).sum(-1).mean().item()

    before = away(young)
    begin(young, wise, ids_of())
    assert all(torch.isfinite(parameter).all() for parameter in young.parameters())
    # As near as it can be where nothing has to be left out.
    assert away(young) < (0.1 if changes in ({}, {"value_head_dim": 16}) else 0.95) * before


def test_every_weight_can_learn() -> None:
    for changes in ({}, {"hidden_size": 40}, {"value_head_dim": 16}, {"head_dim": 16}):
        young = student(**changes)
        begin(young, teacher(), ids_of())
        descent = torch.optim.SGD(young.parameters(), lr=0.01)
        # What has no values yet has no use for its gate until they have come, with the first step.
        for least in (0.75, 1.0):
            descent.zero_grad()
            young(ids_of(2)).square().mean().backward()
            for name, parameter in young.named_parameters():
                assert parameter.grad is not None
                used = parameter.grad.abs().sum(-1) if parameter.dim() > 1 else parameter.grad
                assert (used != 0).float().mean() >= least, name
            descent.step()


def test_the_parts_that_are_chosen() -> None:
    assert layers(2, 16) == [0, 15]
    assert layers(4, 2) == [0, 0, 1, 1]
    assert layers(1, 3) == [1]
    assert pairs(8, 8) == (list(range(8)), list(range(8)))
    assert pairs(4, 8) == ([0, 1, 2, 3], [0, 2, 4, 6])
    assert pairs(8, 4) == ([0, 2, 4, 6], [0, 1, 2, 3])
    hidden = torch.randn(200, 3) @ torch.randn(3, 10)
    basis = directions(hidden.double().t() @ hidden.double(), 3)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(3))
    torch.testing.assert_close(hidden @ basis @ basis.t(), hidden, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_what_is_measured_is_what_the_teacher_computes() -> None:
    wise, ids = teacher(), ids_of(2)
    _, seen = measure(wise, ids)
    given: list[torch.Tensor] = []
    last: Any = wise.blocks[-1]
    last.mixer.output.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    wise(ids)
    size = seen[-1].outputs.diagonal(dim1=1, dim2=2).flatten()
    torch.testing.assert_close(size, given[0].square().mean((0, 1)), atol=1e-5, rtol=1e-4)


def test_through_a_run(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    wise = helpers_distill.teacher_in(tmp_path, **shape, **heads)
    run = trainer(config(tmp_path, wise, "training.init_from_teacher=true"))
    other = trainer(config(tmp_path, wise))
    embedding = AutoModelForCausalLM.from_pretrained(wise).get_input_embeddings().weight
    torch.testing.assert_close(run.model.embedding.weight, embedding)
    run.step()
    other.step()
    assert run.task.record(0.0)["kl"] < other.task.record(0.0)["kl"]
    with pytest.raises(ConfigError, match=r"model\.schedule=once"):
        config(tmp_path, wise, "training.init_from_teacher=true", *helpers_distill.RECURSIVE)
    with pytest.raises(ConfigError, match=r"teacher\.path"):
        config(tmp_path, None, "training.init_from_teacher=true")


def test_a_teacher_of_another_kind_is_refused(tmp_path: Path) -> None:
    short = "training.max_steps=1"
    recursive = train(helpers_recursion.instruct(tmp_path / "recursive", short))
    retention = train(config(tmp_path / "retention", None, short))
    begins = "training.init_from_teacher=true"
    for run in (recursive, retention):
        with pytest.raises(DataError, match=r"a llama or mistral, and the model in .* is none"):
            trainer(config(tmp_path, run.path, begins))
    wise = helpers_distill.teacher_in(tmp_path)
    with pytest.raises(DataError, match="Name the merged checkpoint"):
        trainer(config(tmp_path, wise, begins, f"teacher.adapter={tmp_path}"))
