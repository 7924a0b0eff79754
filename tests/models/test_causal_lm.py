"""The model alone: its size, its first loss, its causality, its cache."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from thimble.config.load import load
from thimble.config.model import ModelConfig
from thimble.models import attention
from thimble.models.causal_lm import CausalLM


def small(**changes: object) -> ModelConfig:
    shape = {
        "vocab_size": 97,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 48,
    }
    return ModelConfig.model_validate({**shape, **changes})


def model_of(config: ModelConfig, seed: int = 0) -> CausalLM:
    return CausalLM(config).initialize(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("slm_tiny", 10_390_784),
        ("slm_small", 46_801_408),
        ("slm_medium", 147_278_592),
        ("slm_large", 460_637_184),
    ],
)
def test_sizes_are_the_specifications(recipe: str, parameters: int) -> None:
    config = load(recipe).model
    with torch.device("meta"):
        assert CausalLM(config).num_parameters() == parameters
    assert config.num_parameters == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_first_loss_is_the_logarithm_of_the_vocabulary(tied: bool) -> None:
    config = small(vocab_size=1000, hidden_size=128, tie_word_embeddings=tied)
    ids = torch.randint(0, 1000, (4, 48), generator=torch.Generator().manual_seed(1))
    logits = model_of(config)(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1000), rel=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_the_past_does_not_see_the_future(training: bool) -> None:
    model = model_of(small())
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.set_grad_enabled(training):  # the two ways attention is computed on a CPU
        before = model(ids)
        for position in (1, 17, 39):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % 97
            after = model(changed)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.allclose(after[:, position], before[:, position])


def test_gradient_of_a_position_reaches_only_its_past() -> None:
    model = model_of(small())
    ids = torch.arange(20)[None]  # every token once, so embedding rows are positions
    model(ids)[0, 9].sum().backward()
    rows = model.blocks[0].mixer.qkv.weight.grad
    assert rows is not None
    embedded = CausalLM(small(tie_word_embeddings=False)).initialize()
    embedded(ids)[0, 9].sum().backward()
    reached = embedded.embedding.weight.grad.abs().sum(-1) > 0
    assert reached.nonzero().flatten().tolist() == list(range(10))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 30, [12, 1, 5, 12], [30]])
def test_cached_equals_uncached(pieces: list[int]) -> None:
    model = model_of(small())
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(3))
    state = model.new_state(2)
    start, parts = 0, []
    for piece in pieces:
        parts.append(model(ids[:, start : start + piece], state))
        start += piece
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (4, 1)])
def test_written_out_attention_equals_torchs(heads: int, kv_heads: int) -> None:
    draw = torch.Generator().manual_seed(4)
    shape = (2, heads, 33, 8)
    q = torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, kv_heads, 33, 8, generator=draw, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    weight = torch.randn(shape, generator=draw, dtype=torch.float64)
    ours = attention.short_causal_attention(q, k, v)
    repeated = [x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v)]
    theirs = F.scaled_dot_product_attention(q, *repeated, is_causal=True)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), [q, k, v]),
        torch.autograd.grad((theirs * weight).sum(), [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


def test_bfloat16_stays_near_float32() -> None:
    model = model_of(small())
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(5))
    exact = model(ids)
    model.compute_dtype = torch.bfloat16
    near = model(ids)
    assert near.dtype is torch.float32
    assert (near - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(near, exact)
