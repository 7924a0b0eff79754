"""Training a recursive model: every example once, the same however it is cut, resumed or split."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import helpers_recursion as helpers
from tests.helpers_training import state_of, timeless
from tests.training.test_resume import interrupt_after
from thimble.config.schema import Config
from thimble.conversations.dataset import Conversations
from thimble.errors import ConfigError, DataError, Interrupted
from thimble.models import interop
from thimble.objectives import act
from thimble.training import checkpoint
from thimble.training.feeds import ConversationFeed
from thimble.training.loop import Trainer, train
from thimble.training.recursion import RecursionTask
from thimble.training.retry import train_with_retries

RUNS = {"instruct": helpers.instruct, "puzzle": helpers.puzzle}


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def recursion(trainer: Trainer) -> RecursionTask:
    assert isinstance(trainer.task, RecursionTask)
    return trainer.task


@pytest.mark.parametrize("q", [-5.0, 5.0])
def test_an_epoch_shows_every_conversation_once(
    q: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[int] = Counter()
    rows = ConversationFeed.rows

    def noted(self: ConversationFeed, numbers: np.ndarray) -> Any:
        seen.update(numbers.tolist())
        return rows(self, numbers)

    monkeypatch.setattr(ConversationFeed, "rows", noted)
    config = helpers.instruct(
        tmp_path, "model.halt_exploration_prob=0.3", "optim.learning_rate=1e-9"
    )
    trainer = helpers.trainer(config)
    with torch.no_grad():
        trainer.model.q_head.bias.fill_(q)
    while not trainer.done:
        trainer.step()
    task = recursion(trainer)
    assert seen == Counter(task.data.split("train").tolist())
    assert trainer.state.windows == task.per_epoch == len(seen)
    figures = dict(zip(("finished", "steps"), task.sums[4:6].tolist(), strict=True))
    assert figures["finished"] == len(seen)
    # A head that never stops gives everything all its steps; one that always would, but few.
    assert (figures["steps"] == 3 * len(seen)) == (q < 0)


@pytest.mark.parametrize("kind", RUNS)
def test_any_split_into_micro_batches_is_the_same_training(kind: str, tmp_path: Path) -> None:
    ends = []
    for micro, accumulation in ((8, 1), (4, 2), (1, 8)):
        config = RUNS[kind](
            tmp_path,
            f"training.micro_batch_size={micro}",
            f"training.gradient_accumulation_steps={accumulation}",
        )
        trainer = helpers.trainer(config)
        for _ in range(5):
            trainer.step()
        ends.append(weights(trainer))
    for other in ends[1:]:
        assert (other - ends[0]).abs().max() < 2e-5


def test_a_batch_is_no_wider_than_its_longest_and_padding_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: Config) -> tuple[list[int], torch.Tensor]:
        trainer, widths = helpers.trainer(config), []
        for _ in range(8):
            trainer.step()
            task = recursion(trainer)
            widths.append(task.carry.rows.inputs.shape[1])
            assert task.lengths.max() <= widths[-1] < task.lengths.max() + 8 or widths[-1] == 80
        return widths, weights(trainer)

    narrow, found = run(helpers.instruct(tmp_path))
    assert len(set(narrow)) > 1
    assert max(narrow) < 80
    monkeypatch.setattr(ConversationFeed, "width", lambda self, longest: 80)
    wide, same = run(helpers.instruct(tmp_path))
    assert set(wide) == {80}
    assert (found - same).abs().max() < 2e-5


def test_weights_of_examples_are_honoured(tmp_path: Path) -> None:
    """Twice the weight of a row is the gradient of having it twice."""
    trainer = helpers.trainer(helpers.instruct(tmp_path))
    task = recursion(trainer)
    rows, _ = task.feed.rows(np.array([0, 1]))
    model = trainer.model

    def gradient(weights: list[float], which: list[int]) -> torch.Tensor:
        model.zero_grad()
        chosen = act.Rows(**{k: v[which] for k, v in vars(rows).items()})
        chosen = act.Rows(**{**vars(chosen), "weight": torch.tensor(weights)})
        carry = act.empty_carry(model, len(which), rows.inputs.shape[1])
        _, out = act.ACT(model)(carry, chosen)
        (out.token_loss / out.token_count).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    double, twice = gradient([2.0, 1.0], [0, 1]), gradient([1.0, 1.0, 1.0], [0, 0, 1])
    assert torch.allclose(double, twice, atol=1e-6)
    assert not torch.allclose(double, gradient([1.0, 1.0], [0, 1]), atol=1e-4)


@pytest.mark.parametrize("kind", RUNS)
def test_resumed_equals_uninterrupted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["optim.ema_rate=0.9", "training.max_steps=14"]
    whole = train(RUNS[kind](tmp_path / "whole", *options))
    config = RUNS[kind](tmp_path / "cut", *options)
    # Between two records, with rows in the middle of their examples.
    interrupt_after(monkeypatch, 8)
    with pytest.raises(Interrupted):
        train(config)
    folder = next((tmp_path / "cut").glob("*/*"))
    cut = train(config, resume=folder)
    assert timeless(cut.path) == timeless(whole.path)
    assert cut.latest
    assert whole.latest
    for part, digest in state_of(whole.latest).items():
        assert state_of(cut.latest)[part] == digest, part


def test_another_batch_size_is_refused_on_resume(tmp_path: Path) -> None:
    run = train(helpers.instruct(tmp_path, "training.max_steps=6"))
    config = helpers.instruct(tmp_path, "training.max_steps=9", "training.micro_batch_size=8")
    with pytest.raises(DataError, match="global_batch_size=8"):
        train(config, resume=run.path)


def test_a_checkpoint_holds_the_average_and_goes_on_from_the_weights(tmp_path: Path) -> None:
    trained = train(helpers.instruct(tmp_path, "optim.ema_rate=0.5", "training.max_steps=6"))
    assert trained.latest
    model = interop.load_model(trained.latest)
    kept = checkpoint.tensors(trained.latest, "trained")
    differing = [n for n, p in model.named_parameters() if not torch.equal(p, kept[n])]
    assert "stacks.0.blocks.0.mlp.down.weight" in differing


def test_records_have_the_documents_names(tmp_path: Path) -> None:
    run = train(helpers.instruct(tmp_path))
    last = [record for record in run.metrics if "loss" in record][-1]
    names = {"lm_loss", "accuracy", "exact_accuracy", "q_halt_loss", "q_halt_accuracy", "steps"}
    assert names | {"lr", "num_params"} <= last.keys()
    assert 1 <= last["steps"] <= 3
    assert last["examples"] == len(Conversations(helpers.conversation_directory()).split("train"))
    assert last["epoch"] == 1.0
    evaluation = [record for record in run.metrics if "val_loss" in record][-1]
    assert len(evaluation["val_by_step"]) == 3
    assert run.checkpoint
    assert (run.checkpoint / "conversation.json").is_file()


def test_the_first_loss_is_that_of_knowing_nothing(tmp_path: Path) -> None:
    trainer = helpers.trainer(helpers.instruct(tmp_path))
    trainer.step()
    total = dict(zip(("sum", "count"), recursion(trainer).sums[:2].tolist(), strict=True))
    # Logits of deviation 1 cost another half.
    assert total["sum"] / total["count"] == pytest.approx(np.log(300) + 0.5, abs=0.35)


def test_weights_of_another_run_are_where_one_begins(tmp_path: Path) -> None:
    first = train(helpers.instruct(tmp_path, "training.max_steps=6"))
    assert first.latest
    second = helpers.trainer(helpers.instruct(tmp_path, f"training.load_checkpoint={first.latest}"))
    loaded = interop.load_model(first.latest)
    for name, weight in second.model.named_parameters():
        assert torch.equal(weight, dict(loaded.named_parameters())[name])
    assert second.state.step == 0
    assert second.state.windows == 0
    with pytest.raises(DataError, match="another model"):
        helpers.trainer(
            helpers.instruct(
                tmp_path, f"training.load_checkpoint={first.latest}", "model.hidden_size=48"
            )
        )


def test_puzzles_give_the_model_its_shape(tmp_path: Path) -> None:
    config = helpers.puzzle(tmp_path)
    model = config.model
    assert (model.vocab_size, model.max_position_embeddings, model.puzzle_identifiers) == (6, 16, 1)
    run = train(config)
    assert run.latest
    found = json.loads((run.latest / "puzzle.json").read_text())
    assert found["kind"] == "sudoku"
    assert found["seq_len"] == 16
    assert not (run.latest / "tokenizer.json").exists()
    # There is no split beside the one that results are reported on, so none is chosen by it.
    assert run.checkpoint is None


# --- options


def test_the_value_of_going_on_is_trained_and_told(tmp_path: Path) -> None:
    run = train(helpers.instruct(tmp_path, "arch.no_ACT_continue=False", "training.max_steps=9"))
    assert all(0 < record["q_continue_loss"] < 1 for record in run.metrics if "loss" in record)
    assert run.latest
    head = interop.load_model(run.latest).q_head
    assert head.weight[1].any()
    without = train(helpers.instruct(tmp_path, "training.max_steps=9"))
    assert not any("q_continue_loss" in record for record in without.metrics)
    assert without.latest
    assert not interop.load_model(without.latest).q_head.weight[1].any()


@pytest.mark.parametrize("kind", RUNS)
def test_learned_positions_are_trained(kind: str, tmp_path: Path) -> None:
    trainer = helpers.trainer(RUNS[kind](tmp_path, "arch.pos_encodings=learned"))
    table = trainer.model.position_embedding.weight
    before = table.detach().clone()
    trainer.step()
    moved = (table != before).any(1)
    width = recursion(trainer).carry.rows.inputs.shape[1] + trainer.model.prefix
    assert moved[: width - 8].all()
    assert not moved[width:].any()


def test_new_puzzles_for_weights_that_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The table alone is trained, from the mean of the old one; all else stays to the bit."""
    first = train(helpers.puzzle(tmp_path, "training.max_steps=6"))
    assert first.latest
    old = interop.load_model(first.latest)
    begin = f"training.load_checkpoint={first.latest}"
    config = helpers.puzzle(
        tmp_path / "new", begin, "freeze_weights=True", "training.max_steps=6", "ema=True"
    )
    more = config.model.model_copy(update={"puzzle_identifiers": 5})
    config = config.model_copy(update={"model": more})
    caplog.set_level("INFO", logger="thimble")
    fresh = helpers.trainer(config).model.puzzle_embedding.weight
    torch.testing.assert_close(fresh, old.puzzle_embedding.weight.mean(0).expand(5, 32))
    run = train(config)
    assert "it had learned 1 puzzles, these are 5" in caplog.text
    assert run.latest
    new = interop.load_model(run.latest)
    names = {n for n, p in new.named_parameters() if n == "puzzle_embedding.weight"}
    for name, weight in new.named_parameters():
        assert name in names or torch.equal(weight, dict(old.named_parameters())[name]), name
    moved = (new.puzzle_embedding.weight != fresh).any(1)
    assert moved.tolist() == [True, False, False, False, False]  # all Sudokus are puzzle 0
    again = config.model_copy(
        update={"training": config.training.model_copy(update={"max_steps": 9})}
    )
    assert train(again, resume=run.path).step == 9


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["freeze_weights=true"], "training.load_checkpoint"),
        (["freeze_weights=true", "model.puzzle_identifiers=0"], "model.puzzle_identifiers=1"),
    ],
)
def test_nothing_to_freeze_or_to_train(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        helpers.puzzle(tmp_path, *overrides)


# --- what goes wrong


def poison(monkeypatch: pytest.MonkeyPatch, bad: int) -> Counter[int]:
    """The loss of this example is NaN; how often each example is given out is counted."""
    seen: Counter[int] = Counter()
    rows = ConversationFeed.rows

    def poisoned(self: ConversationFeed, numbers: np.ndarray) -> Any:
        seen.update(numbers.tolist())
        made, lengths = rows(self, numbers)
        made.weight[torch.from_numpy(numbers == bad)] = float("nan")
        return made, lengths

    monkeypatch.setattr(ConversationFeed, "rows", poisoned)
    return seen


def test_a_poisoned_example_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = helpers.instruct(tmp_path, "optim.warmup_steps=50")
    feed = recursion(helpers.trainer(config)).feed
    order = feed.take(98)
    bad = int(order[45])
    seen = poison(monkeypatch, bad)
    run = train_with_retries(config, 2)
    assert run.status == "finished"
    first, second = json.loads((run.path / "attempts.json").read_text())
    assert (first["kind"], second["outcome"]) == ("nan", "finished")
    begin, end = first["windows"]
    assert begin <= 45 < end <= begin + 8
    assert first["change"]["training.skip_windows"]["to"] == [[begin, end]]
    # The second attempt begins where the checkpoint was and shows every example after it but these.
    passed = set(order[begin:end].tolist())
    assert {number for number, times in seen.items() if number in passed} == passed
    assert all(seen[number] == 1 for number in passed)
    assert seen.keys() == set(order.tolist())
    last = [record for record in run.metrics if "loss" in record][-1]
    assert last["examples"] == 98


@pytest.mark.parametrize("kind", RUNS)
def test_too_little_memory_halves_the_pass_and_changes_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows in the middle of their examples go on in smaller passes."""
    options = ["training.save_every=4", "training.max_steps=9"]
    whole = train(RUNS[kind](tmp_path / "whole", *options))
    step, now = Trainer.step, [0]

    def noted(self: Trainer) -> None:
        now[0] = self.state.step
        step(self)

    forward = act.ACT.forward

    def refuse(self: act.ACT, carry: act.Carry, *more: Any, **named: Any) -> Any:
        if len(carry.rows) == 4 and now[0] == 6:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, carry, *more, **named)

    monkeypatch.setattr(Trainer, "step", noted)
    monkeypatch.setattr(act.ACT, "forward", refuse)
    run = train_with_retries(RUNS[kind](tmp_path / "less", *options), 2)
    first, _ = json.loads((run.path / "attempts.json").read_text())
    assert first["kind"] == "out_of_memory"
    assert first["change"]["training.micro_batch_size"] == {"from": 4, "to": 2}
    assert run.latest
    assert whole.latest
    mine, theirs = (interop.load_model(path).state_dict() for path in (run.latest, whole.latest))
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, atol=2e-5, rtol=1e-4)
    cursors = [(path / "data_cursor.json").read_text() for path in (run.latest, whole.latest)]
    assert cursors[0] == cursors[1]


def test_an_overflow_in_float16_changes_no_weight_at_all(tmp_path: Path) -> None:
    """Nor the puzzles', whose step does not ask how large a gradient is."""
    config = helpers.puzzle(tmp_path, "precision=float16", "optim.warmup_steps=0")
    trainer = helpers.trainer(config)
    for overflows in (False, True, False):
        if overflows:
            trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 3e38})
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.step()
        for name, weight in trainer.model.named_parameters():
            assert torch.isfinite(weight).all(), name
            assert torch.equal(weight, before[name]) is overflows, name
        if overflows:
            trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 1024.0})


def test_conversations_are_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = helpers.instruct(tmp_path, "training.data_parallel=fsdp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="data_parallel=ddp"):
        helpers.trainer(config)


def test_the_panel_knows_what_counting_comes_to(tmp_path: Path) -> None:
    baselines = recursion(helpers.trainer(helpers.instruct(tmp_path))).baselines()
    assert list(baselines) == ["unigram", "bigram"]
    assert baselines["unigram"] > baselines["bigram"] > 0
    assert recursion(helpers.trainer(helpers.puzzle(tmp_path))).baselines() == {}
