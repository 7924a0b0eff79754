"""What a plan says of memory, time and cost, held against real steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import helpers_training
from tests.helpers_cli import Command
from thimble import api
from thimble.config.schema import Config
from thimble.models.causal_lm import CausalLM
from thimble.objectives.next_token import NextToken
from thimble.training import devices, forecast, memory, probe
from thimble.training.optimizer import make_optimizer
from thimble.training.plan import plan


def config(tmp_path: Path, *overrides: str) -> Config:
    return helpers_training.config(tmp_path, *overrides)


def real_step(configuration: Config) -> int:
    """Peak bytes of two real steps, by counting what is allocated while real data flow."""
    training = configuration.training
    with memory.Allocations() as count:
        model = CausalLM(configuration.model).initialize()
        model.checkpoint_activations = training.checkpoint_activations
        objective, optimizer = NextToken(model), make_optimizer(model, configuration.optim)
        shape = (training.micro_batch_size, training.sequence_length)
        ids = torch.randint(0, configuration.model.vocab_size, shape)
        for step in range(2):
            if step:
                count.peak = 0
            for _ in range(training.gradient_accumulation_steps):
                objective(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return count.peak


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim=adamw"],
        ["training.gradient_accumulation_steps=1"],
        ["model.num_hidden_layers=5"],
        ["model.num_hidden_layers=7", "training.checkpoint_activations=true"],
        ["model.tie_word_embeddings=false", "training.micro_batch_size=8"],
    ],
)
def test_the_simulated_peak_is_that_of_a_real_step(tmp_path: Path, overrides: list[str]) -> None:
    chosen = config(
        tmp_path,
        *("model.hidden_size=64", "model.intermediate_size=128", "model.head_dim=32"),
        *overrides,
    )
    predicted = memory.peak_memory(chosen, torch.float32, "cpu")
    assert predicted.total == pytest.approx(real_step(chosen), rel=0.05)
    assert predicted.weights >= 4 * chosen.model.num_parameters
    states = 1 if chosen.optim.name == "muon" else 2
    assert predicted.optimizer >= 4 * states * chosen.model.num_parameters * 0.9


def test_what_makes_memory_smaller_makes_the_prediction_smaller(tmp_path: Path) -> None:
    def total(*overrides: str) -> int:
        size = ("model.num_hidden_layers=4", "training.micro_batch_size=8")
        chosen = config(tmp_path, *size, *overrides)
        return memory.peak_memory(chosen, torch.float32, "cpu").activations

    usual = total()
    assert total("training.checkpoint_activations=true") < 0.5 * usual
    assert total("training.micro_batch_size=4") == pytest.approx(usual / 2, rel=0.1)
    # Positions beyond the first ones come in the same chunks of logits.
    chosen = config(tmp_path)
    on_gpu = memory.peak_memory(chosen, torch.bfloat16, "cuda")
    assert on_gpu.logits > 0


def test_the_peak_of_the_process_is_predicted_within_a_tenth(tmp_path: Path) -> None:
    """The real thing: resident memory of a process that trains, against the plan of it."""
    chosen = config(
        tmp_path,
        *("model.hidden_size=128", "model.intermediate_size=512", "model.head_dim=64"),
        *("model.num_hidden_layers=4", "training.sequence_length=32"),
        *("training.micro_batch_size=64", "training.gradient_accumulation_steps=1"),
    )
    found = forecast.forecast(chosen)
    measured = found.here["peak_measured"]
    assert found.memory.total == pytest.approx(measured, rel=0.1)
    assert found.memory.activations > 20 * 2**20
    assert found.here["tokens_per_second"] > 0
    tokens = found.plan.tokens
    assert found.here["hours"] == pytest.approx(tokens / found.here["tokens_per_second"] / 3600)


@pytest.mark.parametrize(
    ("steps", "warmup", "advice"), [(12, 4, "=1."), (40, 9, "=4."), (4, 1, "")]
)
def test_a_long_warm_up_is_told_with_a_shorter_one(
    steps: int, warmup: int, advice: str, tmp_path: Path
) -> None:
    words = [f"training.max_steps={steps}", f"optim.warmup_steps={warmup}"]
    said = [line for line in plan(config(tmp_path, *words)).warnings if "warm-up" in line]
    assert [line.endswith(f"optim.warmup_steps{advice}") for line in said] == [True] * bool(advice)


def test_what_does_not_fit_gets_a_proposal_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(
        tmp_path, "training.micro_batch_size=32", "training.gradient_accumulation_steps=2"
    )
    half = memory.peak_memory(forecast._with(chosen, 16, 4), torch.float32, "cpu").total
    monkeypatch.setattr(devices, "available_memory", lambda device: half / forecast.USABLE * 1.1)
    found = forecast.forecast(chosen, measure=False)
    assert found.proposal == {
        "training.micro_batch_size": 16,
        "training.gradient_accumulation_steps": 4,
    }
    assert any("micro-batch of 32" in warning for warning in found.warnings)
    fitting = config(tmp_path, *(f"{key}={value}" for key, value in found.proposal.items()))
    again = forecast.forecast(fitting, measure=False)
    assert not again.proposal
    assert not any("micro-batch" in warning for warning in again.warnings)
    # Where not even one window fits, activations are computed again; and then nothing helps.
    one = memory.peak_memory(forecast._with(chosen, 1, 64), torch.float32, "cpu").total
    monkeypatch.setattr(devices, "available_memory", lambda device: 0.5 * one)
    assert not forecast.forecast(chosen, measure=False).here["fits"]


def test_hours_and_dollars_follow_from_the_table(tmp_path: Path) -> None:
    found = forecast.forecast(config(tmp_path), measure=False)
    table = forecast._table()
    assert {gpu["gpu"] for gpu in found.gpus} == {"T4", "A100", "H100", "H200"}
    for gpu in found.gpus:
        facts = table["gpus"][gpu["gpu"]]
        for hours, end in zip(gpu["hours"], ("high", "low"), strict=True):
            rate = facts["tflops"] * 1e12 * table["utilization"][end]
            assert hours == pytest.approx(found.plan.flops / rate / 3600)
        assert gpu["dollars"][0] == pytest.approx(gpu["hours"][0] * facts["price"]["low"])
        assert gpu["fits"]
    assert found.prices_of == str(table["date"])
    assert "hours" not in found.here  # nothing was measured


def test_steps_that_cannot_be_taken_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CPU_FLOPS", 1.0)
    found = forecast.forecast(config(tmp_path))
    assert "hours" not in found.here
    assert any("would take about" in warning for warning in found.warnings)
    # A process that dies: what its last line says is kept.
    broken = config(tmp_path, "data.path=/nowhere/at/all")
    assert (
        "/nowhere" in probe._run(broken.model_dump_json())["problem"]
        or "tokens" in probe._run(broken.model_dump_json())["problem"]
    )


def test_the_command(tmp_path: Path, capfd) -> None:
    words = [
        *("data.path=" + helpers_training.token_directory(), "model.vocab_size=300"),
        "training.sequence_length=16",
    ]
    answer = Command(capfd)("plan", "slm_nano", *words, "--no-measure")
    assert answer.status == 0, answer.err
    assert "peak memory" in answer.out
    assert "H200" in answer.out
    answer = Command(capfd)("plan", "slm_nano", *words, "--no-measure", "--json")
    shown = json.loads(answer.out)
    assert shown["memory"]["total"] == sum(
        value for key, value in shown["memory"].items() if key != "total"
    )
    assert shown["parameters"] > 0
    assert api.plan("slm_nano", *words, measure=False).to_dict()["steps"] == shown["steps"]
