"""Deep supervision with halting: who is trained on what, for how long, and with which loss."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers_training import Largest
from thimble.config.model import ModelConfig
from thimble.models.recursive import RecursiveLM
from thimble.objectives import linear_cross_entropy as losses
from thimble.objectives.act import (
    ACT,
    HALT_WEIGHT,
    Carry,
    Output,
    Rows,
    draw_least,
    empty_carry,
    halt,
    refill,
)
from thimble.objectives.linear_cross_entropy import scaled_cross_entropy

TIME, VOCABULARY = 12, 31


def small(**changes: Any) -> ModelConfig:
    shape = {
        "schedule": "recursive",
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": TIME,
        "H_cycles": 2,
        "L_cycles": 1,
        "halt_max_steps": 4,
    }
    return ModelConfig.model_validate({**shape, **changes})


def model_of(config: ModelConfig) -> RecursiveLM:
    return RecursiveLM(config).initialize(torch.Generator().manual_seed(0))


def rows_of(numbers: list[int], prompt: int = 4) -> Rows:
    """Examples that can be told apart: everything in row n is drawn from n."""
    ids = torch.stack(
        [
            torch.randint(0, VOCABULARY, (TIME + 1,), generator=torch.Generator().manual_seed(n))
            for n in numbers
        ]
    )
    labels = ids[:, 1:].clone()
    labels[:, : prompt - 1] = -100
    position = torch.full((len(numbers),), prompt - 1)
    return Rows(ids[:, :-1], labels, position, torch.tensor(numbers), torch.ones(len(numbers)))


def least_of(act: ACT, batch: int, generator: torch.Generator) -> torch.Tensor:
    config = act.model.config
    return draw_least(batch, config.halt_max_steps, config.halt_exploration_prob, generator)


def always(model: RecursiveLM, q: float) -> RecursiveLM:
    """The halting head says the same whatever it sees."""
    with torch.no_grad():
        model.q_head.bias.fill_(q)
    return model


# --- the losses


def naive_stablemax(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    size = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    p = size / size.sum(-1, keepdim=True)
    return -p.gather(-1, targets[:, None])[:, 0].log()


def naive_softmax(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("rows", [64, 100, 10_000])
@pytest.mark.parametrize(
    ("form", "naive"), [("stablemax", naive_stablemax), ("softmax", naive_softmax)]
)
def test_losses_and_gradients_equal_autograd(
    form: str, naive: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_rows", lambda device, vocab_size: rows)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(201, 24, generator=draw, requires_grad=True)
    weight = torch.randn(131, 24, generator=draw, requires_grad=True)  # logits up to about 20
    targets = torch.randint(0, 131, (201,), generator=draw)
    scale = torch.rand(201, generator=draw)
    targets[5:70] = -100
    kept = targets != -100
    ours, right = scaled_cross_entropy(hidden, weight, targets, scale, form)
    mine = torch.autograd.grad(ours / 7, [hidden, weight])
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    logits = exact[0] @ exact[1].t()
    expected = (naive(logits[kept], targets[kept]) * scale[kept]).sum()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(mine, torch.autograd.grad(expected / 7, exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert torch.equal(right[kept], logits.argmax(-1)[kept] == targets[kept])
    assert not right[~kept].any()


def test_nothing_is_right_when_nothing_is_told_apart() -> None:
    hidden, weight = torch.zeros(5, 4), torch.ones(7, 4)
    _, right = scaled_cross_entropy(hidden, weight, torch.arange(5), torch.ones(5), "softmax")
    assert not right.any()


def test_a_position_without_a_target_is_never_right() -> None:
    weight = torch.tensor([[1.0], [0.0]])
    targets = torch.tensor([0, -100, 1])
    _, right = scaled_cross_entropy(torch.ones(3, 1), weight, targets, torch.ones(3), "softmax")
    assert right.tolist() == [True, False, False]


def test_stablemax_bears_logits_that_softmax_saturates_at() -> None:
    hidden = torch.full((1, 1), 300.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    for form, finite in (("softmax", False), ("stablemax", True)):
        loss, _ = scaled_cross_entropy(hidden, weight, torch.tensor([0]), torch.ones(1), form)
        gradient = torch.autograd.grad(loss, hidden)[0]
        assert bool(gradient != 0) is finite


@pytest.mark.parametrize("form", ["softmax", "stablemax"])
def test_memory_does_not_grow_with_positions_times_vocabulary(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_rows", lambda device, vocab_size: 64)
    hidden = torch.randn(1000, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=True)
    with Largest() as seen:
        loss, _ = scaled_cross_entropy(
            hidden, weight, torch.zeros(1000, dtype=torch.int64), torch.ones(1000), form
        )
        loss.backward()
    assert seen.elements == 64 * 500


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize(
    ("form", "naive"), [("stablemax", naive_stablemax), ("softmax", naive_softmax)]
)
def test_the_loss_is_the_one_of_the_papers(per_sequence: bool, form: str, naive: Any) -> None:
    model = model_of(small())
    act = ACT(model, form=form, per_sequence=per_sequence)
    new = rows_of([1, 2, 3, 4])
    new.labels[1, :9] = -100  # a shorter answer
    new.labels[3] = -100  # none at all
    _, out = act(empty_carry(model, 4, TIME), new)
    gradients = torch.autograd.grad(out.mean(), list(model.parameters()))

    z = model.supervision_step(model.initial_latents(4, TIME), model.embed(new.inputs))
    logits, q = model.head(z[0]), model.q_head(z[0][:, 3])[:, 0]
    token_loss, halt_loss, tokens = torch.zeros(()), torch.zeros(()), 0
    for row in range(3):
        kept = new.labels[row] != -100
        each = naive(logits[row][kept], new.labels[row][kept])
        token_loss = token_loss + (each.mean() if per_sequence else each.sum())
        tokens += int(kept.sum())
        right = bool((logits[row].argmax(-1) == new.labels[row])[kept].all())
        halt_loss = halt_loss + F.binary_cross_entropy_with_logits(
            q[row], torch.tensor(right * 1.0)
        )
    expected = token_loss / (3 if per_sequence else tokens) + HALT_WEIGHT * halt_loss / 3
    torch.testing.assert_close(out.mean(), expected, rtol=1e-5, atol=1e-6)
    other = torch.autograd.grad(expected, list(model.parameters()))
    for mine, theirs in zip(gradients, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert out.metrics["tokens"] == tokens
    assert out.metrics["rows"] == 3


def test_rows_without_labels_are_not_right() -> None:
    model = model_of(small())
    new = rows_of([1, 2])
    new.labels.fill_(-100)
    _, out = ACT(model)(empty_carry(model, 2, TIME), new)
    assert out.mean() == 0
    assert out.metrics["rows_right"] == 0
    out.mean().backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters() if p.grad is not None)


def test_only_labelled_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from thimble.objectives import act as module

    seen = []

    def spy(hidden: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(hidden))
        return scaled_cross_entropy(hidden, *rest)

    monkeypatch.setattr(module, "scaled_cross_entropy", spy)
    model = model_of(small())
    ACT(model)(empty_carry(model, 3, TIME), rows_of([1, 2], prompt=8))
    assert seen == [2 * (TIME - 7)]


def test_the_halting_head_reads_the_prompt_and_not_the_answer() -> None:
    model = model_of(small())
    torch.nn.init.normal_(model.q_head.weight)
    new, position = rows_of([1]), 3

    def q(rows: Rows) -> torch.Tensor:
        x = model.embed(rows.inputs)
        z = model.supervision_step(model.initial_latents(1, TIME), x)
        return model.q_values(z, rows.position)

    for changed in range(TIME):
        other = rows_of([1])
        other.inputs[0, changed] = (other.inputs[0, changed] + 1) % VOCABULARY
        assert torch.equal(q(other), q(new)) is (changed > position)


# --- the carry


def test_the_carry_is_detached_and_goes_on_where_it_was() -> None:
    model = model_of(small())
    act = ACT(model)
    carry, _ = act(empty_carry(model, 2, TIME), rows_of([1, 2]))
    assert not any(latent.requires_grad for latent in carry.latents)
    for step in range(2, 4):
        carry, _ = act(carry)
        *_, z = model.unroll(rows_of([1, 2]).inputs, steps=step)
        for mine, theirs in zip(carry.latents, z, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert carry.steps.tolist() == [step, step]


def test_a_new_example_starts_anew_and_leaves_its_neighbours_alone() -> None:
    model = model_of(small())
    act = ACT(model)
    carry, _ = act(empty_carry(model, 3, TIME), rows_of([1, 2, 3]))
    freed = Carry(carry.rows, carry.latents, carry.steps, torch.tensor([False, True, False]))
    after, _ = act(freed, rows_of([9]))
    alone, _ = act(empty_carry(model, 1, TIME), rows_of([9]))
    undisturbed, _ = act(carry)
    assert after.steps.tolist() == [2, 1, 2]
    assert after.rows.puzzle.tolist() == [1, 9, 3]
    torch.testing.assert_close(after.latents[0][1], alone.latents[0][0], rtol=1e-5, atol=1e-5)
    for row in (0, 2):
        torch.testing.assert_close(after.latents[1][row], undisturbed.latents[1][row])


def test_more_examples_than_free_rows_are_refused() -> None:
    model = model_of(small())
    carry = refill(empty_carry(model, 3, TIME), rows_of([1, 2]), model)
    assert carry.free == 1
    with pytest.raises(ValueError, match="2 new examples for 1 free"):
        refill(carry, rows_of([3, 4]), model)


def feed(act: ACT, examples: int, batch: int) -> tuple[Counter[int], list[Output], list[Carry]]:
    """One pass over numbered examples, as a training loop would do it."""
    generator = torch.Generator().manual_seed(5)
    carry = empty_carry(act.model, batch, TIME)
    waiting, seen = list(range(examples)), Counter[int]()
    outputs, carries = [], []
    while waiting or not carry.idle:
        taken, waiting = waiting[: carry.free], waiting[carry.free :]
        seen.update(taken)
        carry, out = act(carry, rows_of(taken) if taken else None, least_of(act, batch, generator))
        outputs.append(out)
        carries.append(carry)
        assert len(outputs) < 1000
    return seen, outputs, carries


@pytest.mark.parametrize(("batch", "examples"), [(4, 37), (5, 3), (1, 4)])
@pytest.mark.parametrize("q", [-5.0, 5.0])
def test_every_example_is_trained_on_once(batch: int, examples: int, q: float) -> None:
    act = ACT(always(model_of(small(halt_exploration_prob=0.5)), q))
    seen, outputs, _ = feed(act, examples, batch)
    assert seen == Counter(range(examples))
    assert sum(int(out.metrics["finished"]) for out in outputs) == examples
    # Every supervision step of every example counts once, and idle rows not at all.
    steps = sum(int(out.metrics["finished_steps"]) for out in outputs)
    assert sum(int(out.metrics["rows"]) for out in outputs) == steps
    if q < 0:
        assert steps == examples * 4


# --- halting


def test_at_the_maximum_every_row_halts_and_never_later() -> None:
    act = ACT(always(model_of(small(halt_exploration_prob=1.0)), -5.0))
    _, _, carries = feed(act, 9, 3)
    assert max(int(carry.steps.max()) for carry in carries) == 4
    for carry in carries:
        assert torch.equal(carry.halted, carry.steps >= 4)


def test_rows_halt_where_the_head_says_so() -> None:
    steps, q = torch.tensor([1, 1, 2, 4]), torch.tensor([1.0, -1.0, 0.0, -1.0])
    stop = halt(steps, q, max_steps=4)
    assert stop.tolist() == [True, False, False, True]


def test_exploration_keeps_rows_from_halting_early() -> None:
    """Of rows that want to stop at once, a share p goes on, each to a step it draws."""
    generator, count = torch.Generator().manual_seed(0), 20_000
    q = torch.ones(count)
    shares = []
    for step in range(1, 6):
        steps = torch.full((count,), step)
        stop = halt(steps, q, max_steps=5, least=draw_least(count, 5, 0.4, generator))
        shares.append(stop.float().mean().item())
    # At step s a row goes on when it explores and drew more than s out of 2..5.
    expected = [1 - 0.4 * min(1, (5 - step) / 4) for step in range(1, 6)]
    assert shares == pytest.approx(expected, abs=0.015)
    assert shares[-1] == 1.0


def test_one_step_leaves_nothing_to_explore() -> None:
    stop = halt(torch.ones(3), torch.full((3,), -5.0), max_steps=1, least=draw_least(3, 1, 1.0))
    assert stop.all()


def test_draws_repeat_with_the_generator() -> None:
    first, same, other = (
        draw_least(200, 9, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_evaluation_gives_every_row_all_steps() -> None:
    act = ACT(always(model_of(small()), 5.0)).eval()
    _, outputs, _ = feed(act, 4, 2)
    assert sum(int(out.metrics["finished_steps"]) for out in outputs) == 4 * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": False, "puzzle_identifiers": 40, "puzzle_emb_len": 2},
        {"causal": False, "mixer": "mlp"},
        {"single_z": True},
        {"separate_stacks": True, "bp_cycles": 0},
    ],
)
def test_every_arrangement_trains(changes: dict[str, Any]) -> None:
    model = model_of(small(**changes))
    act = ACT(model, form="stablemax", per_sequence=True)
    carry, out = act(empty_carry(model, 3, TIME), rows_of([1, 2, 3]))
    out.mean().backward()
    assert torch.isfinite(out.mean())
    assert all(p.grad is not None for p in model.parameters())
    assert len(carry.latents) == (1 if changes.get("single_z") else 2)


# --- the value of going on


def test_what_going_on_is_worth_is_told_by_the_step_after() -> None:
    """HRM's target, written out: the better of both values one step later, at the last of halting
    alone; without gradients through it."""
    model = model_of(small(q_continue=True, halt_max_steps=3))
    torch.nn.init.normal_(model.q_head.weight, generator=torch.Generator().manual_seed(3))
    torch.nn.init.zeros_(model.q_head.bias[1:])
    act, new = ACT(model), rows_of([1, 2, 3])
    new.labels[2] = -100
    with torch.no_grad():
        values = [model.q_values(z, new.position) for z in model.unroll(new.inputs, steps=4)]
    assert (values[1][:2, 1] > values[1][:2, 0]).any()  # so that it matters which is taken
    carry = Carry(**{**vars(empty_carry(model, 3, TIME)), "halted": torch.ones(3).bool()})
    for step in range(3):
        least = torch.full((3,), 9)
        carry, out = act(carry, new if step == 0 else None, least)
        ahead = values[step + 1][:2]
        target = ahead[:, 0] if step == 2 else ahead.amax(1)
        expected = F.binary_cross_entropy_with_logits(
            values[step][:2, 1], target.sigmoid(), reduction="sum"
        )
        torch.testing.assert_close(out.continue_loss, expected, rtol=1e-4, atol=1e-5)
        (bias,) = torch.autograd.grad(out.continue_loss, model.q_head.bias, retain_graph=True)
        assert bias[0] == 0
        wanted = (values[step][:2, 1].sigmoid() - target.sigmoid()).sum()
        torch.testing.assert_close(bias[1], wanted, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            out.mean() - out.token_loss / out.token_count,
            HALT_WEIGHT * (out.halt_loss + out.continue_loss) / 2,
        )
    assert carry.halted.all()


def test_rows_halt_where_that_is_worth_more_than_going_on() -> None:
    for bias, steps in (([-3.0, -2.0], 4), ([-2.0, -3.0], 1), ([2.0, 3.0], 4)):
        model = model_of(small(q_continue=True))
        with torch.no_grad():
            model.q_head.bias.copy_(torch.tensor(bias))
        carry = empty_carry(model, 2, TIME)
        for taken in range(1, 5):
            carry, _ = ACT(model)(carry, rows_of([1, 2]) if taken == 1 else None)
            if carry.halted.all():
                break
        assert taken == steps


# --- controls


@pytest.mark.parametrize("form", ["softmax", "stablemax"])
def test_labels_drawn_at_random_are_never_learned(form: str) -> None:
    """Each example is trained on once, so nothing about it can be known before: whoever seems to
    beat the labels' entropy has been told them."""
    model = model_of(small(hidden_size=32, head_dim=16))
    act = ACT(model, form=form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, carry = torch.Generator().manual_seed(1), empty_carry(model, 16, TIME)
    losses = []
    numbers = iter(range(100_000))
    for _ in range(60):
        new = rows_of([next(numbers) for _ in range(carry.free)]) if carry.free else None
        fresh = carry.halted.clone()
        carry, out = act(carry, new, least_of(act, 16, generator))
        out.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        # Rows in their first step have labels that nothing has been trained on yet.
        if fresh.all():
            losses.append((out.token_loss / out.token_count).item())
    assert len(losses) > 10
    assert min(losses) > math.log(VOCABULARY) - 0.15
    assert losses[-1] < losses[0]  # it has learned that there is nothing to know


# --- end to end


def test_eight_answers_learned_are_given_word_for_word() -> None:
    """A model that trained on eight sequences says each of them, token by token over its caches.

    What training calls right and what generation says must be the same thing: a shift by one, a
    position that is hidden, or another number of steps would show here.
    """
    config = small(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        head_dim=16,
        halt_max_steps=2,
        H_cycles=2,
        L_cycles=2,
    )
    model = model_of(config)
    act, prompt = ACT(model), 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    carry = empty_carry(model, 8, TIME)
    order = [n for _ in range(200) for n in range(8)]
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 150)
        taken, order = order[: carry.free], order[carry.free :]
        carry, out = act(
            carry, rows_of(taken, prompt) if taken else None, least_of(act, 8, generator)
        )
        out.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = rows_of(list(range(8)), prompt)
    steps = model.halting_steps(rows.inputs[:, :prompt], rows.position)
    for row, (inputs, labels) in enumerate(zip(rows.inputs, rows.labels.tolist(), strict=True)):
        state = model.new_state(1, steps=int(steps[row]))
        feed, said = inputs[None, :prompt], []
        while len(said) < TIME - prompt + 1:
            with torch.no_grad():
                feed = model(feed, state)[:, -1:].argmax(-1)
            said.append(int(feed))
        assert said == labels[prompt - 1 :]
    assert out.metrics["rows_right"] == 8
    assert steps.float().mean() < 2  # it knows that it knows
