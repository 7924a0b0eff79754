"""Generation through a recursion's caches says what training would have said at each position."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers_recursive import model_config, network_of
from thimble.errors import ConfigError
from thimble.generation.sampling import choose, generate_ids, log_weights, read
from thimble.models.recursive import RecursiveLM
from thimble.objectives.act import ACT, Rows, empty_carry
from thimble.objectives.linear_cross_entropy import FORMS, IGNORE

TRM: dict[str, Any] = {"num_hidden_layers": 2, "L_cycles": 2}
HRM: dict[str, Any] = {"separate_stacks": True, "bp_cycles": 0, "L_cycles": 2}
SINGLE: dict[str, Any] = {"single_z": True, "L_cycles": 2}
HRM_TEXT: dict[str, Any] = {
    "separate_stacks": True,
    "pre_norm": True,
    "attention_gate": True,
    "inject_input": False,
    "bp_cycles": 2,
    "halt_max_steps": 1,
}
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 1}
NEAR: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}


def network(changes: dict[str, Any], seed: int = 0) -> RecursiveLM:
    return network_of(model_config(vocab_size=61, max_position_embeddings=40, **changes), seed)


def prompt_of(length: int, seed: int = 1) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 61, (length,), generator=draw).tolist()


def generated(
    model: RecursiveLM, prompt: list[int], count: int, **options: Any
) -> tuple[list[int], torch.Tensor, int]:
    """Ids [N], the logits [N, V] each was chosen from, and the steps thought."""
    seen: list[tuple[torch.Tensor, int, int | None]] = []
    ids = list(
        generate_ids(
            model,
            prompt,
            max_tokens=count,
            watch=lambda *token: seen.append(token),
            **(GREEDY | options),
        )
    )
    assert ids == [chosen for _, chosen, _ in seen]
    (steps,) = {thought for *_, thought in seen}
    assert steps is not None
    return ids, torch.stack([logits for logits, *_ in seen]), steps


@torch.no_grad()
def trained_on(model: RecursiveLM, rows: list[list[int]], begin: int, steps: int) -> torch.Tensor:
    """What the training objective has for these rows after ``steps`` supervision steps of padded
    batches: logits [N, T, V]."""
    width = 40
    inputs = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    batch = Rows(
        inputs=inputs,
        labels=torch.full_like(inputs, IGNORE),
        position=torch.full((len(rows),), begin - 1),
        puzzle=torch.zeros(len(rows), dtype=torch.int64),
        weight=torch.ones(len(rows)),
    )
    act = ACT(model).eval()  # no row halts before halt_max_steps
    carry, new = empty_carry(model, len(rows), width), batch
    for step in range(steps):
        carry, _ = act(carry, new if step == 0 else None)
    return model.head(carry.latents[0])


@pytest.mark.parametrize("changes", [TRM, HRM, SINGLE])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_generated_token_is_the_one_of_training(changes: dict[str, Any], steps: int) -> None:
    model = network(changes)
    prompts = [prompt_of(6, seed) for seed in range(4)]
    # Random weights soon repeat themselves when greedy: two texts of many different tokens, too.
    texts = [
        generated(model, prompt, 20, steps=steps, temperature=temperature)
        for prompt, temperature in zip(prompts, (0.0, 0.0, 2.0, 2.0), strict=True)
    ]
    assert min(len(set(ids)) for ids, *_ in texts[2:]) > 10
    rows = [prompt + ids for prompt, (ids, *_) in zip(prompts, texts, strict=True)]
    forced = trained_on(model, rows, 6, steps)[:, 5:25]
    for number, (logits, (ids, seen, thought)) in enumerate(zip(forced, texts, strict=True)):
        assert thought == steps
        torch.testing.assert_close(seen, logits, **NEAR)
        assert number > 1 or logits.argmax(-1).tolist() == ids


@pytest.mark.parametrize(
    ("changes", "steps"),
    [*itertools.product([TRM, HRM, SINGLE], [None, 1, 3]), (HRM_TEXT, None)],
)
def test_caches_change_nothing(changes: dict[str, Any], steps: int | None) -> None:
    model = network(changes)
    prompt = prompt_of(9)
    for temperature in (0.0, 2.0):
        ids, seen, thought = generated(model, prompt, 31, steps=steps, temperature=temperature)
        text = list(prompt)
        for index, token in enumerate(ids):
            with torch.no_grad():
                logits = model(torch.tensor([text]), steps=thought)[0, -1]
            torch.testing.assert_close(seen[index], logits, **NEAR)
            assert temperature or int(logits.argmax()) == token
            text.append(token)


@torch.no_grad()
@pytest.mark.parametrize("changes", [TRM, HRM, SINGLE, HRM_TEXT])
def test_no_token_depends_on_what_follows(changes: dict[str, Any]) -> None:
    """What was chosen when nothing followed is what is computed whatever follows."""
    model = network(changes)
    prompt = prompt_of(8)
    ids, seen, thought = generated(model, prompt, 16, temperature=2.0)
    for index in range(len(ids)):
        for follows in (0, 60):
            text = torch.tensor([prompt + ids[:index] + [follows] * 9])
            logits = model(text, steps=thought)[0, len(prompt) + index - 1]
            torch.testing.assert_close(seen[index], logits, **NEAR)
    # The same through the caches: a block of positions, the last of them changed.
    _, one, _ = read(model, torch.tensor([prompt]), 30)
    _, other, _ = read(model, torch.tensor([prompt]), 30)
    block = torch.tensor([ids[:6]])
    changed = block.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 61
    a, b = model.hidden(block, one), model.hidden(changed, other)
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("changes", [TRM, HRM, SINGLE])
def test_padding_changes_neither_the_steps_nor_the_answer(changes: dict[str, Any]) -> None:
    model = network(changes)
    prompt = prompt_of(9)
    ids, seen, steps = generated(model, prompt, 10, temperature=2.0)
    for pad, room in ((0, 1), (60, 12)):
        padded = F.pad(torch.tensor([prompt + ids]), (0, room), value=pad)
        assert int(model.halting_steps(padded, torch.tensor([8]))) == steps
        logits = model(padded, steps=steps)[0, 8:18]
        torch.testing.assert_close(seen, logits, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("changes", [TRM, HRM, SINGLE])
def test_the_halting_head_decides_at_the_end_of_the_prompt(changes: dict[str, Any]) -> None:
    """Whether or not the answer is there, as it is in training; and it is asked nowhere else."""
    model = network(changes | {"halt_max_steps": 4})
    found = set()
    for seed in range(12):
        prompt = prompt_of(9, seed)
        ids, _, thought = generated(model, prompt, 10)
        answered = torch.tensor([prompt + ids])
        assert thought == int(model.halting_steps(answered, torch.tensor([8])))
        hidden, state, steps = read(model, torch.tensor([prompt]), 20)
        assert steps == thought
        assert len(state) == thought * model.config.blocks_per_step
        torch.testing.assert_close(hidden, model.hidden(answered[:, :9], steps=thought), **NEAR)
        found.add(thought)
    assert len(found) > 2


def test_more_steps_are_another_answer_and_stay_beyond_the_context() -> None:
    model = network(TRM)
    answers = {steps: generated(model, prompt_of(9), 60, steps=steps) for steps in (1, 2, 5)}
    assert len({tuple(ids) for ids, *_ in answers.values()}) == 3
    for steps, (ids, _, thought) in answers.items():
        assert len(ids) == 60
        assert thought == steps


def test_what_stops_is_watched_but_not_said() -> None:
    model = network(TRM)
    ids, *_ = generated(model, prompt_of(5), 12)
    seen: list[int] = []
    stopped = generate_ids(
        model,
        prompt_of(5),
        max_tokens=12,
        stop=frozenset({ids[4]}),
        watch=lambda logits, token, steps: seen.append(token),
        **GREEDY,
    )
    first = ids.index(ids[4])
    assert list(stopped) == ids[:first]
    assert seen == ids[: first + 1]


def test_what_sees_the_future_generates_nothing() -> None:
    with pytest.raises(ConfigError, match="cache"):
        list(generate_ids(network({"causal": False}), [1, 2], max_tokens=3, **GREEDY))


@pytest.mark.parametrize("form", ["softmax", "stablemax"])
def test_probabilities_are_those_of_the_loss(form: str) -> None:
    logits = torch.randn(61, generator=torch.Generator().manual_seed(0)) * 8
    losses, _ = FORMS[form](logits.expand(61, -1), torch.arange(61)[:, None], False)
    probabilities = log_weights(logits, form).softmax(-1)
    torch.testing.assert_close(probabilities, (-losses).exp(), atol=1e-7, rtol=1e-5)
    assert log_weights(logits, form).argsort().equal(logits.argsort())


def test_sampling_follows_stablemax() -> None:
    logits = torch.tensor([3.0, 0.0, -1.0])  # weights 4, 1 and 1/2
    draw = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[choose(logits, 1.0, 0, 1.0, draw, "stablemax")] += 1
    expected = torch.tensor([4.0, 1.0, 0.5]) / 5.5
    torch.testing.assert_close(counts / 4000, expected, atol=0.03, rtol=0)
