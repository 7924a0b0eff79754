"""A plan of a recursive model: FLOPs as PyTorch counts them, memory as real steps take it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers_recursion import instruct, puzzle
from tests.helpers_recursive import model_config
from thimble import api
from thimble.config.schema import Config
from thimble.models import interop
from thimble.models.recursive import RecursiveLM
from thimble.objectives.act import ACT, Carry, empty_carry
from thimble.training import forecast, memory
from thimble.training.ema import EMA
from thimble.training.optimizer import make_optimizer
from thimble.training.plan import flops_per_token

SHAPES: dict[str, dict[str, Any]] = {
    "trm": {"num_hidden_layers": 2, "H_cycles": 3, "L_cycles": 2},
    "hrm": {"separate_stacks": True, "bp_cycles": 0, "L_cycles": 2},
    "mlp": {"mixer": "mlp", "causal": False},
    "single_z": {"single_z": True, "L_cycles": 3},
    "bp_cycles": {"bp_cycles": 2},
    "gated": {"attention_gate": True, "pre_norm": True},
    "puzzles": {"causal": False, "puzzle_identifiers": 5, "puzzle_emb_len": 16},
    "mlp puzzles": {"mixer": "mlp", "causal": False, "puzzle_identifiers": 5, "puzzle_emb_len": 4},
    "q_continue": {"q_continue": True},
}


def all_labelled(model: RecursiveLM, batch: int) -> tuple[Carry, tuple[torch.Tensor, torch.Tensor]]:
    config = model.config
    time = config.max_position_embeddings
    carry = empty_carry(model, batch, time)
    ids = torch.randint(0, config.vocab_size, (batch, time))
    rows = replace(carry.rows, inputs=ids, labels=ids)
    free = torch.zeros(batch, dtype=torch.bool)
    numbers = torch.arange(batch * time)
    return replace(carry, rows=rows, halted=free), (numbers // time, numbers % time)


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_are_computed(name: str) -> None:
    config = model_config(hidden_size=64, intermediate_size=192, **SHAPES[name])
    model = interop.new_model(config)
    assert isinstance(model, RecursiveLM)
    carry, where = all_labelled(model, 2)
    # As matrix products attention is counted whole: not halved where it is causal.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ACT(model)(carry, where=where)[1].mean().backward()
    whole = flops_per_token(config.model_copy(update={"causal": False}), 64)
    assert 2 * 64 * whole == pytest.approx(counter.get_total_flops(), rel=0.02)
    if config.causal:  # half of the scores and of the sums over them
        seen = 2 * config.num_attention_heads * config.head_dim * config.num_positions
        blocks = config.blocks_per_step * (2 if config.q_continue else 1)
        blocks += 2 * config.blocks_with_gradients
        assert whole - flops_per_token(config, 64) == pytest.approx(seen * blocks)


def real_step(config: Config) -> int:
    """Peak bytes of two real steps, by counting what is allocated while real data flow."""
    training = config.training
    with memory.Allocations() as count:
        model = interop.new_model(config.model).initialize()
        assert isinstance(model, RecursiveLM)
        model.checkpoint_activations = training.checkpoint_activations
        options = config.objective
        act = ACT(model, form=options.form, per_sequence=options.per_sequence)
        optimizer = make_optimizer(model, config.optim)
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(name, p) for name, p in model.named_parameters() if id(p) in updated]
        averages = EMA(named, config.optim.ema_rate) if config.optim.ema_rate else None
        carry, where = all_labelled(model, training.micro_batch_size)
        for step in range(2):
            if step:
                count.peak = 0
            for _ in range(training.gradient_accumulation_steps):
                act(carry, where=where)[1].mean().backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            if averages is not None:
                averages.update()
    return count.peak


WIDER = ["model.hidden_size=64", "model.intermediate_size=128", "model.head_dim=32"]


@pytest.mark.parametrize(
    ("make", "overrides"),
    [
        (instruct, []),
        (instruct, ["model.H_cycles=3", "model.L_cycles=2", "model.num_hidden_layers=2"]),
        (instruct, ["model.num_hidden_layers=5", "training.gradient_accumulation_steps=1"]),
        (instruct, ["model.bp_cycles=2", "training.checkpoint_activations=true"]),
        (instruct, ["model.separate_stacks=true", "model.bp_cycles=0"]),
        (instruct, ["model.single_z=true", "optim=adamw", "optim.ema_rate=0.99"]),
        (puzzle, []),
        (puzzle, ["model.mixer=mlp"]),
    ],
)
def test_the_simulated_peak_is_that_of_a_real_step(
    tmp_path: Path, make: Any, overrides: list[str]
) -> None:
    config = make(tmp_path, *WIDER, *overrides)
    predicted = memory.peak_memory(config, torch.float32, "cpu")
    assert predicted.total == pytest.approx(real_step(config), rel=0.05)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each precision of the table is simulated by itself; one is enough here."""
    table = forecast._table()
    monkeypatch.setattr(
        forecast, "_table", lambda: {**table, "gpus": {"H100": table["gpus"]["H100"]}}
    )


@pytest.mark.usefixtures("one_gpu")
def test_a_plan_of_conversations_and_of_puzzles_takes_real_steps(tmp_path: Path) -> None:
    one = "training.gradient_accumulation_steps=1"
    for config in (instruct(tmp_path, one), puzzle(tmp_path, one, "training.micro_batch_size=1")):
        found = forecast.forecast(config)
        assert "problem" not in found.here
        pace = found.here["tokens_per_second"]
        assert found.here["hours"] == pytest.approx(found.plan.tokens / pace / 3600)
        most = found.here["hours"] * found.plan.halting_at_once
        assert found.here["hours_halting_at_once"] == pytest.approx(most)
    # Puzzles go on until their steps are done, whenever each of them halts.
    assert found.plan.halting_at_once == 1
    assert found.plan.tokens == 12 * 1 * 16  # steps, puzzles of a step, cells of a puzzle


def test_an_epoch_takes_as_many_steps_as_planned(tmp_path: Path) -> None:
    """With halting switched off the most a plan speaks of is what happens."""
    config = instruct(tmp_path, "training.max_epochs=1", "model.halt_exploration_prob=0.0")
    from thimble.training.plan import plan

    made = plan(config)
    assert made.halting_at_once == pytest.approx(1 / 3)
    from thimble.training.loop import train

    run = train(config)
    assert 0.5 * made.steps <= run.step <= made.steps


@pytest.mark.usefixtures("one_gpu")
def test_words_before_the_overrides_are_stages(tmp_path: Path) -> None:
    data = f"data.path={instruct(tmp_path).data.path}"
    words = [data, "dataset.name=null", "model.vocab_size=300", "model.hidden_size=32"]
    alone = api.plan("instruct_os", *words, measure=False)
    both = api.plan("instruct_os", "instruct_os", *words, measure=False)
    assert both.sum["tokens"] == 2 * alone.plan.tokens
    assert both.sum["here"] is None  # nothing was measured
    assert set(both.to_dict()) == {"stages", "sum"}
