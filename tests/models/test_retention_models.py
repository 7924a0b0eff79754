"""Models made of retention: their sizes, states, documents and generation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from thimble.config.load import load
from thimble.config.schema import ModelConfig
from thimble.errors import ConfigError
from thimble.generation.sampling import generate_ids
from thimble.models import retention
from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM
from thimble.models.retention import (
    RetentionState,
)
from thimble.training.plan import flops_per_token

GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 1}


# --- the language model


def small(**changes: Any) -> ModelConfig:
    shape = {
        "mixer": "retention",
        "vocab_size": 97,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "retention_horizons": [3.0, 100.0],
        "retention_chunk": 8,
    }
    return ModelConfig.model_validate({**shape, **changes})


def model_of(config: ModelConfig, seed: int = 0) -> CausalLM:
    return CausalLM(config).initialize(torch.Generator().manual_seed(seed))


def loud(config: ModelConfig) -> CausalLM:
    """With weights so large that every part of it shows in the logits."""
    model = model_of(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 10
    return model


def ids_of(rows: int = 2, time: int = 30, seed: int = 1, vocabulary: int = 97) -> Tensor:
    return torch.randint(0, vocabulary, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Vocabulary x d + layers x 17 d^2, and the norms: 2 a block and the last.
        ("retnet_350m", 128256 * 960 + 12 * 17 * 960**2 + 25 * 960),
        ("retnet_500m", 128256 * 1152 + 15 * 17 * 1152**2 + 31 * 1152),
        ("retnet_nano", None),
    ],
)
def test_the_students_have_their_sizes(name: str, parameters: int | None) -> None:
    config = load("slm_nano", [f"model={name}"]).model
    with torch.device("meta"):
        model = CausalLM(config)
    assert model.num_parameters() == config.num_parameters
    assert parameters in (None, config.num_parameters)


def test_twelve_heads_forget_as_in_the_paper() -> None:
    shape = {"num_attention_heads": 12, "num_key_value_heads": 12}
    layer = retention.Retention(small(**shape, retention_horizons=[32.0, 65536.0]))
    expected = torch.log1p(-(2.0 ** -(5 + torch.arange(12.0, dtype=torch.float64))))
    torch.testing.assert_close(layer.log_gamma.double(), expected, rtol=1e-6, atol=0)
    alone = retention.Retention(small(num_attention_heads=1, num_key_value_heads=1))
    assert alone.log_gamma.exp().item() == pytest.approx(1 - 1 / 3)


@pytest.mark.parametrize("changes", [{}, {"value_head_dim": 16}, {"tie_word_embeddings": False}])
def test_the_configuration_knows_the_parameters(changes: dict[str, Any]) -> None:
    config = small(**changes)
    assert model_of(config).num_parameters() == config.num_parameters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 2}, "model.num_key_value_heads=4"),
        ({"retention_horizons": [9.0, 3.0]}, r"model.retention_horizons=\[3,9\]"),
        ({"causal": False, "schedule": "recursive"}, "model.mixer=attention"),
        ({"position_embedding": "learned", "schedule": "recursive"}, "position_embedding=none"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    pairs = [f"model.{key}={str(value).lower()}" for key, value in {**heads, **changes}.items()]
    with pytest.raises(ConfigError, match=words):
        load("slm_nano", ["model=retnet_nano", *pairs])


def test_the_work_grows_with_the_length_not_with_its_square() -> None:
    config = small()
    model = model_of(config)
    counted = []
    for time in (512, 2048):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids_of(1, time))
        counted.append(counter.get_total_flops() / time)
        planned = flops_per_token(config, time) / 3
        # The plan counts a chunk's products causally, half of what is multiplied.
        assert 0.7 * counted[-1] < planned < counted[-1]
    assert counted[1] < 1.01 * counted[0]
    assert flops_per_token(config, 2048) == flops_per_token(config, 512)


@pytest.mark.parametrize("tied", [True, False])
def test_first_loss_is_the_logarithm_of_the_vocabulary(tied: bool) -> None:
    config = small(
        vocab_size=1000, hidden_size=128, tie_word_embeddings=tied, value_head_dim=16, head_dim=16
    )
    ids = ids_of(4, 48, vocabulary=1000)
    logits = model_of(config)(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1000), rel=0.05)


def test_the_past_does_not_see_the_future() -> None:
    model = loud(small())
    ids = ids_of()
    with torch.no_grad():
        before = model(ids)
        for position in (1, 17, 29):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % 97
            after = model(changed)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.allclose(after[:, position], before[:, position])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pieces", [[1] * 60, [24, 1, 11, 24], [60]])
def test_state_by_state_is_the_whole_beyond_the_context_too(
    pieces: list[int], dtype: torch.dtype
) -> None:
    model = loud(small()).to(dtype)
    model.compute_dtype = dtype
    ids = ids_of(time=60)
    state = model.new_state(2)
    begin, parts = 0, []
    for piece in pieces:
        parts.append(model.hidden(ids[:, begin : begin + piece], state))
        begin += piece
    assert all(layer.length == 60 for layer in state)
    mine, whole = torch.cat(parts, dim=1), model.hidden(ids)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-4  # three layers, weights ten times large
    torch.testing.assert_close(mine, whole, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_documents_in_one_row_are_what_they_are_alone() -> None:
    model = loud(small()).double()
    model.compute_dtype = torch.float64
    ids = ids_of(1, 30)
    starts = torch.zeros(1, 30, dtype=torch.bool)
    starts[0, [0, 11, 12]] = True
    packed = model(ids, starts_bt=starts)
    alone = [model(ids[:, begin:end]) for begin, end in ((0, 11), (11, 12), (12, 30))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(packed[:, 12:], model(ids)[:, 12:], atol=1e-2)
    # The same in two calls, the second of which goes on with the last document.
    state = model.new_state(1)
    parts = [model(ids[:, a:b], state, starts[:, a:b]) for a, b in ((0, 17), (17, 30))]
    torch.testing.assert_close(torch.cat(parts, dim=1), packed, atol=1e-5, rtol=1e-5)


def test_activations_computed_again_give_the_same_gradient() -> None:
    starts = ids_of() % 7 == 0
    found = []
    for again in (False, True):
        model = model_of(small())
        model.checkpoint_activations = again
        model(ids_of(), starts_bt=starts).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


@torch.no_grad()
def test_generation_goes_on_beyond_the_context_and_forgets_nothing() -> None:
    model = loud(small())
    made: list[list[RetentionState]] = []
    original = model.new_state

    def counted(*args: Any) -> list[RetentionState]:
        made.append(original(*args))  # type: ignore[arg-type]
        return made[-1]

    model.new_state = counted  # type: ignore[method-assign, assignment]
    prompt = ids_of(1, 40)[0].tolist()  # longer than the context of 32 already
    ids = list(generate_ids(model, prompt, max_tokens=60, **GREEDY))
    (state,) = made
    assert all(layer.memory.shape == (1, 4, 8, 8) for layer in state)
    assert all(layer.length == 99 for layer in state)
    whole = model(torch.tensor([prompt + ids]))[0]
    assert ids == whole[39:-1].argmax(-1).tolist()
    assert len(set(ids)) > 3


def test_bfloat16_stays_near_float32() -> None:
    model = model_of(small())
    exact = model(ids_of())
    model.compute_dtype = torch.bfloat16
    near = model(ids_of())
    assert near.dtype is torch.float32
    assert (near - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(near, exact)


def test_it_learns_to_copy_from_far_behind() -> None:
    """The second half repeats the first: only a memory helps, no statistics of words do."""
    config = small(
        vocab_size=16, hidden_size=64, head_dim=16, intermediate_size=64, num_hidden_layers=2
    )
    model = model_of(config)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(130):
        half = torch.randint(0, 16, (16, 6), generator=draw)
        ids = torch.cat([half, half], dim=1)
        logits = model(ids[:, :-1])[:, 6:]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 7:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * math.log(16)


# --- the recursive model

RECURSIVE: dict[str, Any] = {
    "schedule": "recursive",
    "num_hidden_layers": 2,
    "H_cycles": 2,
    "L_cycles": 2,
    "halt_max_steps": 3,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"separate_stacks": True},
    {"single_z": True},
    {"position_embedding": "none"},
    {"separate_stacks": True, "num_hidden_layers": 1, "bp_cycles": 2, "value_head_dim": 12},
]


def recursive_of(**changes: Any) -> RecursiveLM:
    config = small(**{**RECURSIVE, **changes})
    model = RecursiveLM(config).initialize(torch.Generator().manual_seed(0)).double()
    model.compute_dtype = torch.float64
    return model


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_recursive_configuration_knows_the_parameters(changes: dict[str, Any]) -> None:
    model = recursive_of(**changes)
    assert model.num_parameters() == model.config.num_parameters


def test_the_recursive_student_is_as_large_as_the_plain_one() -> None:
    plain = load("slm_nano", ["model=retnet_nano"]).model
    recursive = load("slm_nano", ["model=retnet_hrm", "objective.name=act"]).model
    with torch.device("meta"):
        assert RecursiveLM(recursive).num_parameters() == recursive.num_parameters
    # It has a halting head, and no scales in its norms.
    assert recursive.num_parameters == pytest.approx(plain.num_parameters, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("pieces", [[1] * 40, [17, 1, 6, 16], [40]])
def test_every_index_of_the_recursion_carries_its_state(
    changes: dict[str, Any], pieces: list[int]
) -> None:
    model = recursive_of(**changes)
    ids = ids_of(time=40)  # beyond the context
    for steps in (1, 3):
        state = model.new_state(2, steps=steps)
        assert len(state) == steps * model.config.blocks_per_step
        begin, parts = 0, []
        for piece in pieces:
            parts.append(model.hidden(ids[:, begin : begin + piece], state))
            begin += piece
        whole = model.hidden(ids, steps=steps)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_the_states_of_the_recursion_are_not_one_and_the_same() -> None:
    model = recursive_of()
    state = model.new_state(2)
    model.hidden(ids_of(), state)
    for one, other in itertools.combinations([layer.memory for layer in state], 2):
        assert not torch.allclose(one, other)


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS)
def test_documents_of_a_recursive_model_are_what_they_are_alone(changes: dict[str, Any]) -> None:
    model = recursive_of(**changes)
    # Rotations are float32 numbers: the same distance at another place is the same to 1e-7 only,
    # and a recursion enlarges that. Without rotations documents are equal to rounding.
    model.rope_2sc[0], model.rope_2sc[1] = 1, 0
    ids = ids_of(1, 30)
    starts = torch.zeros(1, 30, dtype=torch.bool)
    starts[0, [11, 12]] = True
    packed = model.hidden(ids, starts_bt=starts)
    alone = [model.hidden(ids[:, begin:end]) for begin, end in ((0, 11), (11, 12), (12, 30))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(packed[:, 12:], model.hidden(ids)[:, 12:], atol=1e-3)


def test_a_recursive_model_recomputes_the_same_gradient_across_documents() -> None:
    starts = ids_of() % 7 == 0
    found = []
    for again in (False, True):
        model = recursive_of(bp_cycles=2)
        model.checkpoint_activations = again
        model(ids_of(), starts_bt=starts).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_a_recursive_model_generates_beyond_its_context() -> None:
    model = recursive_of()
    prompt = ids_of(1, 25)[0].tolist()
    ids = list(generate_ids(model, prompt, max_tokens=30, **GREEDY))  # type: ignore[arg-type]
    whole = model(torch.tensor([prompt + ids]))[0]
    assert ids == whole[24:-1].argmax(-1).tolist()
    assert len(set(ids)) > 3
