"""Failures provoked for real, and what the next attempt does about them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import helpers_training as helpers
from thimble import api
from thimble.config.load import load_run
from thimble.config.schema import Config
from thimble.errors import DataError, GuardStop
from thimble.models.causal_lm import CausalLM
from thimble.objectives.next_token import NextToken
from thimble.tokens.loader import Windows
from thimble.tokens.shards import TokenSplit
from thimble.training import train, train_with_retries
from thimble.training.retry import ATTEMPTS, remedy
from thimble.training.run import RunFolder


def only_run(tmp_path: Path) -> Path:
    (run,) = (tmp_path / "slm_nano").iterdir()
    return run


def attempts(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / ATTEMPTS).read_text())


def poison_batch(config: Config, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the window at this place of the order one whose loss is NaN, whenever it comes."""
    split = TokenSplit(config.data.path, "train")
    windows = Windows(split.tokens, config.training.sequence_length, config.seed)
    bad = torch.from_numpy(windows.batch(place, 1)[0])
    inner = NextToken.forward

    def forward(self: NextToken, inputs: torch.Tensor, *others: Any) -> torch.Tensor:
        loss = inner(self, inputs, *others)
        return loss * float("nan") if (inputs == bad).all(1).any() else loss

    monkeypatch.setattr(NextToken, "forward", forward)


def test_a_poisoned_batch_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = helpers.config(tmp_path, "training.micro_batch_size=2")  # 4 windows a step
    poison_batch(config, 26, monkeypatch)
    run = train_with_retries(config, 3)
    assert run.status == "finished"
    first, second = attempts(run.path)
    assert (first["kind"], first["step"], first["windows"]) == ("nan", 6, [24, 28])
    assert first["checkpoint"].endswith("step-000004")
    assert first["evidence"][-1]["step"] == 6
    assert first["change"] == {
        "optim.learning_rate": {"from": 0.01, "to": 0.005},
        "optim.warmup_steps": {"from": 4, "to": 8},
        "training.skip_windows": {"from": [], "to": [[24, 28]]},
    }
    assert second == {"attempt": 2, "started": second["started"], "outcome": "finished"}
    assert load_run(run.path).optim.learning_rate == 0.005  # a later --resume keeps the remedy
    events = [record["event"] for record in RunFolder(run.path).records() if "event" in record]
    assert events == ["guard", "resumed", "finished"]
    cursor = json.loads((run.path / "checkpoints" / "step-000012" / "data_cursor.json").read_text())
    assert cursor["windows_seen"] == 12 * 4 + 4  # one batch more than the steps took


def test_an_old_checkpoint_is_refused_with_retries_too(tmp_path: Path) -> None:
    run = train(helpers.config(tmp_path)).path
    with pytest.raises(DataError, match="not the newest usable checkpoint"):
        train_with_retries(load_run(run), 3, run / "checkpoints" / "step-000004")


def test_attempts_of_an_earlier_call_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = helpers.config(tmp_path, "training.micro_batch_size=2")
    poison_batch(config, 26, monkeypatch)
    run = train_with_retries(config, 3).path
    train_with_retries(load_run(run), 3, run)
    assert [attempt["attempt"] for attempt in attempts(run)] == [1, 2, 3]


def test_windows_that_are_skipped_are_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[int] = []
    inner = Windows.order

    def order(self: Windows, seen: int, size: int) -> Any:
        places.extend(range(seen, seen + size))
        return inner(self, seen, size)

    monkeypatch.setattr(Windows, "order", order)
    skip = "training.skip_windows=[[40,48],[8,12],[12,16]]"
    train(helpers.config(tmp_path, "training.micro_batch_size=2", skip))
    assert places == [*range(8), *range(16, 40), *range(48, 64)]


def test_an_exploding_learning_rate_is_lowered_three_times_then_given_up(tmp_path: Path) -> None:
    config = helpers.config(
        tmp_path, "optim.learning_rate=1.0", "guards.max_grad_norm=0.01", "training.max_steps=40"
    )
    with pytest.raises(GuardStop, match="attempt 4 was the last") as stopped:
        train_with_retries(config, 3)
    run = only_run(tmp_path)
    assert stopped.value.run == run
    made = attempts(run)
    assert [attempt["kind"] for attempt in made] == ["explosion"] * 4
    rates = [attempt["change"]["optim.learning_rate"]["to"] for attempt in made[:-1]]
    assert rates == [0.5, 0.25, 0.125]
    assert made[-1]["change"] == {}
    assert all(attempt["outcome"] == "stopped" for attempt in made)


def test_an_explosion_that_a_lower_rate_mends(tmp_path: Path) -> None:
    """Without warm-up the gradient of this model grows; the limit lies between two rates."""
    options = ["optim=adamw", "optim.warmup_steps=0", "optim.grad_clip=1000.0"]

    def highest(rate: float) -> float:
        run = train(helpers.config(tmp_path / str(rate), *options, f"optim.learning_rate={rate}",
                                   "training.log_every=1"))  # fmt: skip
        return max(record["grad_norm"] for record in run.metrics if "grad_norm" in record)

    high, low = highest(0.8), highest(0.1)
    assert low < high
    limit = f"guards.max_grad_norm={(high + low) / 2}"
    run = train_with_retries(
        helpers.config(tmp_path / "x", *options, "optim.learning_rate=0.8", limit), 3
    )
    assert run.status == "finished"
    assert attempts(run.path)[0]["kind"] == "explosion"


def test_a_plateau_raises_the_rate_once(tmp_path: Path) -> None:
    config = helpers.config(
        tmp_path,
        "optim.learning_rate=1e-12",
        "guards.plateau_steps=20",
        "training.max_steps=400",
        "training.save_every=10",
    )
    with pytest.raises(GuardStop, match="nothing is left to change"):
        train_with_retries(config, 3)
    first, second = attempts(only_run(tmp_path))
    assert first["change"] == {"optim.learning_rate": {"from": 1e-12, "to": 2e-12}}
    assert (second["kind"], second["change"]) == ("plateau", {})
    assert second["step"] >= first["step"] + 10  # counted anew, not stopped at once


CHILD = """
import resource, sys, torch
from pathlib import Path
from tests import helpers_training as helpers
from thimble.training import train_with_retries, train
torch.set_num_threads(1)
shape = ["training.sequence_length=64", "model.max_position_embeddings=64", "training.max_steps=2"]
def config(name, micro):
    return helpers.config(Path(sys.argv[1]) / name, *shape,
        f"training.micro_batch_size={micro}", "training.gradient_accumulation_steps=1")
train(config("warm", 1))  # what is loaded once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run = train_with_retries(config("tight", 8192), 8)
print(run.path)
"""


def test_too_little_memory_halves_the_micro_batch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), "300"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.strip().splitlines()[-1])
    *stopped, last = attempts(run)
    assert last["outcome"] == "finished"
    assert [attempt["kind"] for attempt in stopped] == ["out_of_memory"] * len(stopped)
    assert stopped[0]["change"]["training.micro_batch_size"] == {"from": 8192, "to": 4096}
    training = load_run(run).training
    assert training.micro_batch_size * training.gradient_accumulation_steps == 8192
    assert training.checkpoint_activations == (len(stopped) > 1)


def test_memory_remedies_end(tmp_path: Path) -> None:
    config = helpers.config(
        tmp_path, "training.micro_batch_size=1", "training.checkpoint_activations=true"
    )
    assert remedy("out_of_memory", [0, 1], config, []) == {}
    config = helpers.config(tmp_path, "training.micro_batch_size=9")
    change = remedy("out_of_memory", [0, 1], config, [])
    assert change["training.micro_batch_size"] == 3
    assert change["training.gradient_accumulation_steps"] == 6


def test_activations_computed_again_give_the_same_gradients(tmp_path: Path) -> None:
    config = helpers.config(tmp_path)
    gradients = []
    for recompute in (False, True):
        model = CausalLM(config.model).initialize(torch.Generator().manual_seed(0))
        model.checkpoint_activations = recompute
        ids = torch.arange(32).view(2, 16) % config.model.vocab_size
        NextToken(model)(ids, ids.roll(-1, 1)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = helpers.config(tmp_path, "training.micro_batch_size=2", "training.log_every=1")
    poison_batch(config, 9, monkeypatch)
    run = train_with_retries(config, 1)
    assert attempts(run.path)[0]["checkpoint"] == "none yet"
    steps = [record["step"] for record in run.metrics if "loss" in record]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("good", [True, False])
def test_a_command_of_the_user_learns_how_it_ended(
    good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = helpers.config(tmp_path)
    if not good:
        poison_batch(config, 9, monkeypatch)
    overrides = [f"output_dir={tmp_path}", f"data.path={config.data.path}"]
    monkeypatch.setattr("thimble.config.load.load", lambda *given: config)
    command = f'echo "$THIMBLE_STATUS $THIMBLE_RUN" > {tmp_path}/{{}}'
    hooks = {"on_success": command.format("good"), "on_failure": command.format("bad")}
    if good:
        api.train("slm_nano", *overrides, **hooks)
    else:
        with pytest.raises(GuardStop):
            api.train("slm_nano", *overrides, **hooks)
    told = tmp_path / ("good" if good else "bad")
    status, run = told.read_text().split()
    assert (status, Path(run)) == ("0" if good else "4", only_run(tmp_path).resolve())
    assert not (tmp_path / ("bad" if good else "good")).exists()
