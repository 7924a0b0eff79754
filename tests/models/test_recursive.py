"""The recursion alone: its sizes, its causality, its gradients, its caches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from thimble.config.load import load
from thimble.config.model import ModelConfig
from thimble.errors import ConfigError
from thimble.generation.sampling import read
from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM, truncated_normal_

HRM_TEXT = {
    "separate_stacks": True,
    "pre_norm": True,
    "attention_gate": True,
    "inject_input": False,
    "embedding_scale": 7.0,
    "halt_max_steps": 1,
    "bp_cycles": 3,
}
PUZZLE = {"causal": False}
MLP = {"mixer": "mlp", "causal": False}
SINGLE = {"single_z": True}
SEPARATE = {"separate_stacks": True}
PLAIN = {"single_z": True, "H_cycles": 1, "L_cycles": 1, "halt_max_steps": 1}
WITH_PUZZLES = {"causal": False, "puzzle_identifiers": 7, "puzzle_emb_len": 3}
LEARNED = {"position_embedding": "learned"}
NOWHERE = {"position_embedding": "none"}
CAUSAL: list[dict[str, Any]] = [{}, SEPARATE, SINGLE, PLAIN, HRM_TEXT, LEARNED, NOWHERE]
EVERY: list[dict[str, Any]] = [*CAUSAL, PUZZLE, MLP, WITH_PUZZLES, MLP | WITH_PUZZLES]


def small(**changes: Any) -> ModelConfig:
    shape = {
        "schedule": "recursive",
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 20,
        "tie_word_embeddings": False,
        "H_cycles": 3,
        "L_cycles": 2,
        "halt_max_steps": 3,
    }
    return ModelConfig.model_validate({**shape, **changes})


def published(**changes: Any) -> ModelConfig:
    """The shape of the published models: hidden 512, 8 heads, two layers."""
    shape: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "L_cycles": 6,
    }
    return small(**{**shape, **changes})


def model_of(config: ModelConfig, seed: int = 0) -> RecursiveLM:
    return RecursiveLM(config).initialize(torch.Generator().manual_seed(seed))


def ids_of(rows: int = 2, time: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, (rows, time), generator=torch.Generator().manual_seed(seed))


def puzzles_of(config: ModelConfig, rows: int = 2) -> torch.Tensor | None:
    return torch.arange(rows) + 3 if config.puzzle_identifiers else None


# --- sizes


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"vocab_size": 32000}, 39_584_770),
        ({"vocab_size": 32000, "tie_word_embeddings": True}, 23_200_770),
        ({"vocab_size": 128}, 6_947_842),
        # HRM as others counted it on Sudoku: two stacks of four layers.
        (
            {"vocab_size": 11, "separate_stacks": True, "num_hidden_layers": 4},
            27_275_266,
        ),
    ],
)
def test_sizes_are_those_of_the_published_models(changes: dict[str, Any], parameters: int) -> None:
    config = published(**changes)
    with torch.device("meta"):
        assert RecursiveLM(config).num_parameters() == parameters
    assert config.num_parameters == parameters
    if config.vocab_size == 32000 and not config.tie_word_embeddings:
        assert parameters - 2 * 32000 * 512 == 6_816_770


def test_the_mlp_is_the_paper_s_five_million_on_sudoku() -> None:
    config = published(
        **MLP, vocab_size=11, max_position_embeddings=81, puzzle_identifiers=1, puzzle_emb_len=16
    )
    with torch.device("meta"):
        assert RecursiveLM(config).num_parameters() == config.num_parameters
    core = 2 * (3 * 97 * 512 + 3 * 512 * 1536) + 1026
    assert config.num_parameters == core + 2 * 11 * 512 + 512


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (MLP | {"attention_gate": True}, "attention_gate belongs to attention"),
        (HRM_TEXT | {"separate_stacks": False, "single_z": True}, "needs a z_H"),
        (HRM_TEXT | {"halt_max_steps": 2}, "model.halt_max_steps=1"),
        (HRM_TEXT | {"bp_cycles": 2}, "model.bp_cycles=3"),
        ({"embedding_scale": 0.0}, "greater than 0"),
        ({"q_continue": True, "halt_max_steps": 1}, r"model\.q_continue=false"),
        (LEARNED | {"schedule": "once"}, r"model\.position_embedding=rope"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_without_injection_the_embedding_still_learns() -> None:
    model = model_of(small(**HRM_TEXT))
    model(ids_of()).logsumexp(-1).sum().backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.abs().max() > 0
    assert model.H_init.grad is None


@pytest.mark.parametrize("changes", EVERY)
def test_the_configuration_knows_the_parameters(changes: dict[str, Any]) -> None:
    for tied in (True, False):
        config = small(**changes, tie_word_embeddings=tied)
        assert model_of(config).num_parameters() == config.num_parameters


def test_plain_transformers_of_equal_parameters_and_of_equal_computation() -> None:
    def flops(config: ModelConfig) -> int:
        model = model_of(config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids_of())
        return counter.get_total_flops()

    recursive = small(halt_max_steps=1)
    same_size = small(**PLAIN)
    same_work = small(**PLAIN, num_hidden_layers=recursive.blocks_per_step)
    assert same_size.num_parameters == recursive.num_parameters
    assert flops(same_work) == flops(recursive)
    assert flops(same_size) < flops(recursive) / 3
    assert recursive.blocks_per_step == 3 * (2 + 1) * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixer": "mlp"}, "model.causal=false"),
        ({"causal": False, "schedule": "once"}, "model.schedule=recursive"),
        ({"puzzle_identifiers": 3}, "model.causal=false"),
        ({"bp_cycles": 4}, "model.bp_cycles=3"),
        ({**SINGLE, **SEPARATE}, "model.single_z=false"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)
    overrides = [f"model.{key}={str(value).lower()}" for key, value in changes.items()]
    with pytest.raises(ConfigError, match=words):
        load("slm_nano", ["model.schedule=recursive", *overrides])


def test_each_schedule_has_its_own_model() -> None:
    with pytest.raises(ConfigError, match="schedule=once"):
        CausalLM(small())
    with pytest.raises(ConfigError, match="schedule=recursive"):
        RecursiveLM(load("slm_nano").model)


# --- beginnings


def test_truncated_normal_has_its_deviation_and_its_ends() -> None:
    draw = torch.empty(200_000)
    truncated_normal_(draw, 0.3, torch.Generator().manual_seed(0))
    assert draw.std().item() == pytest.approx(0.3, rel=0.01)
    assert draw.mean().item() == pytest.approx(0.0, abs=0.003)
    assert draw.abs().max() <= 2 * 0.3 / 0.8796
    assert draw.abs().max() > 0.65


@pytest.mark.parametrize("changes", [{}, PUZZLE, SINGLE, SEPARATE])
@pytest.mark.parametrize("tied", [True, False])
def test_first_loss_is_the_logarithm_of_the_vocabulary(changes: dict[str, Any], tied: bool) -> None:
    config = small(
        **changes,
        vocab_size=2000,
        hidden_size=192,
        intermediate_size=256,
        head_dim=48,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    ids = torch.randint(0, 2000, (8, 65), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model_of(config)(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    # Logits have deviation 1, and E[exp] of such is exp(1/2).
    assert loss.item() == pytest.approx(math.log(2000) + 0.5, abs=0.25)
    assert logits.std().item() == pytest.approx(1.0, abs=0.15)


def test_a_position_is_its_token_and_its_latents_the_same_everywhere() -> None:
    config = small(**WITH_PUZZLES, hidden_size=64)
    model = model_of(config)
    assert model.puzzle_embedding is not None
    torch.nn.init.ones_(model.puzzle_embedding.weight[5].data)
    ids = ids_of(time=9)
    x = model.embed(ids, torch.tensor([5, 4]))
    torch.testing.assert_close(x[:, 3:], model.embedding.weight[ids] * 8)
    assert x[:, 3:].std().item() == pytest.approx(1.0, abs=0.05)
    torch.testing.assert_close(x[0, 0], torch.full((64,), 8.0))
    assert not x[0, 1:3].any()
    assert not x[1, :3].any()
    z_H, z_L = model.initial_latents(2, 12)
    assert torch.equal(z_H, model.H_init.expand(2, 12, 64))
    assert torch.equal(z_L, model.L_init.expand(2, 12, 64))


@torch.no_grad()
def test_learned_positions_are_added_and_what_a_position_is_keeps_its_size() -> None:
    model = model_of(small(**LEARNED, hidden_size=64))
    assert model.position_embedding is not None
    ids = ids_of(time=9)
    together = model.embedding.weight[ids] + model.position_embedding.weight[:9]
    x = model.embed(ids)
    torch.testing.assert_close(x, together * 8 * 0.5**0.5)
    assert x.std().item() == pytest.approx(1.0, abs=0.05)
    puzzle = model_of(small(**WITH_PUZZLES, **LEARNED))
    assert puzzle.position_embedding is not None
    assert len(puzzle.position_embedding.weight) == 23
    assert not torch.equal(*puzzle.embed(ids[:1, :1].expand(1, 20), torch.tensor([1]))[0, 3:5])


@torch.no_grad()
def test_without_positions_the_order_says_nothing() -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    for kind, same in (("none", True), ("rope", False), ("learned", False)):
        model = model_of(small(**PUZZLE, position_embedding=kind))
        ids = ids_of()
        near = torch.allclose(model(ids)[:, order], model(ids[:, order]), atol=1e-5)
        assert near is same, kind


@torch.no_grad()
def test_wherever_halting_is_asked_for_it_is_the_same_rule() -> None:
    model = model_of(small(q_continue=True, halt_max_steps=6))
    ids, position = ids_of(24), torch.full((24,), 11)
    torch.nn.init.normal_(model.q_head.weight, generator=torch.Generator().manual_seed(2))
    torch.nn.init.zeros_(model.q_head.bias)
    q = torch.stack([model.q_values(z, position) for z in model.unroll(ids[:, :12])])
    stops = q[..., 0] > q[..., 1]
    stops[-1] = True
    expected = stops.int().argmax(0) + 1
    assert len(expected.unique()) > 2
    assert torch.equal(model.halting_steps(ids[:, :12], position), expected)
    for row in range(6):
        _, _, steps = read(model, ids[row : row + 1, :12], 20)
        assert steps == expected[row]


def test_halting_has_to_be_worth_more_than_going_on() -> None:
    q = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, -1.0]])
    assert (model_of(small()).halting_logit(q) > 0).tolist() == [True, False, True]
    assert (model_of(small(q_continue=True)).halting_logit(q) > 0).tolist() == [False, True, True]


def test_the_halting_head_begins_with_go_on() -> None:
    model = model_of(small())
    *_, z = model.unroll(ids_of())
    q = model.q_values(z, torch.tensor([4, 9]))
    assert torch.equal(q, torch.full((2, 2), -5.0))
    with pytest.raises(ConfigError, match="halting head"):
        model.q_values(z)


def test_rows_stop_where_the_halting_head_says_so() -> None:
    model = model_of(small(halt_max_steps=6))
    torch.nn.init.normal_(model.q_head.weight, generator=torch.Generator().manual_seed(4))
    ids, position = ids_of(40), torch.arange(40) % 19 + 1
    with torch.no_grad():
        q = torch.stack([model.q_values(z, position)[:, 0] for z in model.unroll(ids)])
        model.q_head.bias[0] -= q.median()  # as many would stop as go on
    steps = model.halting_steps(ids, position)
    q = q - q.median()
    for row, step in enumerate(steps.tolist()):
        assert (q[: step - 1, row] <= 0).all()
        assert step == 6 or q[step - 1, row] > 0
    assert len(steps.unique()) > 2
    model.q_head.bias.data[0] = 1e6
    assert model.halting_steps(ids, position).eq(1).all()
    model.q_head.bias.data[0] = -1e6
    assert model.halting_steps(ids, position).eq(6).all()


def test_beginnings_are_kept_with_the_weights_but_not_trained() -> None:
    model = model_of(small())
    names = {name for name, _ in model.named_parameters()}
    assert {"H_init", "L_init"} <= model.state_dict().keys()
    assert not {"H_init", "L_init"} & names
    model(ids_of()).sum().backward()
    assert model.H_init.grad is None
    assert model.H_init.std() > 0.5


# --- causality


def latents_of_every_call(model: RecursiveLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """What every call of a stack gives, in every cycle of every supervision step."""
    found: list[torch.Tensor] = []
    hooks = [
        stack.register_forward_hook(lambda module, given, made: found.append(made.detach()))
        for stack in model.stacks
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("changes", CAUSAL)
@pytest.mark.parametrize("training", [True, False])
def test_the_past_does_not_see_the_future(changes: dict[str, Any], training: bool) -> None:
    config = small(**changes)
    model = model_of(config)
    ids = ids_of()
    with torch.set_grad_enabled(training):
        before = latents_of_every_call(model, ids)
        steps = [model.head(z[0]) for z in model.unroll(ids)]
        assert len(before) * config.num_hidden_layers == (
            config.blocks_per_step * config.halt_max_steps
        )
        for position in (1, 11, 19):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % 61
            for mine, other in zip(before, latents_of_every_call(model, changed), strict=True):
                assert torch.equal(mine[:, :position], other[:, :position])
            for mine, z in zip(steps, model.unroll(changed), strict=True):
                other = model.head(z[0])
                assert torch.equal(mine[:, :position], other[:, :position])
                assert not torch.allclose(mine[:, position], other[:, position])


@torch.no_grad()
@pytest.mark.parametrize("changes", CAUSAL)
def test_the_past_does_not_see_the_future_in_a_batch_of_caches_or_compiled(
    changes: dict[str, Any],
) -> None:
    """A block of positions after a prefix, all of them seeing the prefix, none the next one."""
    model = model_of(small(num_hidden_layers=1, **{"L_cycles": 1, **changes}))
    ids = ids_of()
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 61

    def cached(given: torch.Tensor) -> torch.Tensor:
        state = model.new_state(2)
        return torch.cat([model(given[:, :7], state), model(given[:, 7:], state)], dim=1)

    before, after = cached(ids), cached(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15], after[:, 15])
    # Of the compiler only what it traces is asked: generating code for each takes long.
    step = torch.compile(model.supervision_step, backend="aot_eager")
    z = model.initial_latents(2, 20)
    traced, other = (model.head(step(z, model.embed(x))[0]) for x in (ids, changed))
    assert torch.equal(traced[:, :15], other[:, :15])
    assert not torch.allclose(traced[:, 15], other[:, 15])
    torch.testing.assert_close(traced, model(ids, steps=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [PUZZLE, MLP, WITH_PUZZLES])
def test_a_puzzle_s_positions_all_see_each_other(changes: dict[str, Any]) -> None:
    config = small(**changes)
    model = model_of(config)
    ids, puzzles = ids_of(), puzzles_of(config)
    changed = ids.clone()
    changed[:, 19] = (changed[:, 19] + 1) % 61
    with torch.no_grad():
        difference = model(ids, puzzles_b=puzzles) - model(changed, puzzles_b=puzzles)
    assert (difference.abs().amax(-1) > 0).all()


def test_an_mlp_takes_its_number_of_positions_only() -> None:
    model = model_of(small(**MLP))
    with pytest.raises(ConfigError, match="max_position_embeddings=19"):
        model(ids_of(time=19))


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model = model_of(small())
    ids = ids_of(time=12)
    bare = model(ids)
    for pad, room in itertools.product((0, 60), (1, 8)):
        padded = F.pad(ids, (0, room), value=pad)
        torch.testing.assert_close(model(padded)[:, :12], bare, atol=1e-5, rtol=1e-5)
    alone = torch.cat([model(ids[:1]), model(ids[1:])])
    torch.testing.assert_close(alone, bare, atol=1e-5, rtol=1e-5)


def test_every_puzzle_has_its_own_embedding() -> None:
    config = small(**WITH_PUZZLES)
    model = model_of(config)
    assert model.puzzle_embedding is not None
    one, other = (model(ids_of(), puzzles_b=torch.tensor(p)) for p in ([3, 4], [0, 6]))
    torch.testing.assert_close(one, other)  # they begin as zeros
    one.sum().backward()
    gradient = model.puzzle_embedding.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.coalesce().indices()[0].tolist() == [3, 4]
    with torch.no_grad():
        model.puzzle_embedding.weight.normal_()
    changed = model(ids_of(), puzzles_b=torch.tensor([3, 5]))
    again = model(ids_of(), puzzles_b=torch.tensor([3, 4]))
    assert torch.equal(changed[0], again[0])
    assert not torch.allclose(changed[1], again[1])
