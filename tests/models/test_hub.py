"""Recursive models through transformers' Auto classes: the same numbers, the same words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import thimble.hub as hub
from tests.models import test_recursive
from tests.models.test_interop_recursive import save
from tests.models.test_recursive import HRM_TEXT, PUZZLE, SINGLE, ids_of, model_of, small
from thimble.errors import ConfigError
from thimble.generation.sampling import generate_ids
from thimble.models import interop
from thimble.models.recursive import RecursiveLM

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}
RETENTION: dict[str, Any] = {
    "mixer": "retention",
    "num_key_value_heads": 4,
    "retention_horizons": [4, 64],
    "retention_chunk": 8,
}
CAUSAL = [*test_recursive.CAUSAL, RETENTION]


def words(rows: int = 2, time: int = 20, seed: int = 1) -> torch.Tensor:
    """Ids without 0, which transformers takes for padding where it is told no mask."""
    return ids_of(rows, time, seed).clamp(min=1)


def both(directory: Path, **changes: Any) -> tuple[RecursiveLM, hub.ThimbleRecursiveForCausalLM]:
    """A model of ours that halts here and there, and what transformers reads from its files."""
    ours = model_of(small(**changes))
    with torch.no_grad():
        ours.q_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
        ours.q_head.bias.zero_()
        # About half of the prompts stop after the first step.
        first = next(ours.unroll(words(40, 6)))
        ours.q_head.bias[0] = -ours.q_values(first, torch.full((40,), 5))[:, 0].median()
    theirs = AutoModelForCausalLM.from_pretrained(save(ours, directory))
    assert isinstance(theirs, hub.ThimbleRecursiveForCausalLM)
    return ours, theirs


def wide(directory: Path, **changes: Any) -> tuple[RecursiveLM, hub.ThimbleRecursiveForCausalLM]:
    """``both`` in float64: a recursion of retention makes much of what is rounded."""
    ours, theirs = both(directory, **changes)
    ours.double().compute_dtype = torch.float64
    return ours, theirs.double()


def greedy_of_ours(model: RecursiveLM, prompt: list[int], **more: Any) -> list[int]:
    options = {"max_tokens": 9, "temperature": 0, "top_k": 0, "top_p": 1, "seed": 0}
    return list(generate_ids(model, prompt, **options, **more))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("changes", CAUSAL)
def test_the_same_logits_loss_and_gradients(
    changes: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    ours, theirs = both(tmp_path, **changes, tie_word_embeddings=tied)
    assert theirs.dtype is torch.float32
    ids = words(2, 12)
    labels = ids.masked_fill(torch.arange(12) < 4, -100)
    output = theirs(ids, labels=labels)
    logits = ours(ids)
    assert torch.equal(output.logits, logits)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, loss)
    output.loss.backward()
    loss.backward()
    for (name, wanted), got in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not name.startswith("q_head"):
            torch.testing.assert_close(got.grad, wanted.grad, msg=name)
    last = theirs(ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, logits[:, -1:])


@pytest.mark.parametrize("changes", CAUSAL)
def test_greedy_words_are_ours_with_and_without_a_cache(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = wide(tmp_path, **changes)
    depths = {int(theirs(words(1, 6, seed), steps="halting").steps) for seed in range(20)}
    for seed in range(5):
        ids = words(1, 6, seed)
        wanted = greedy_of_ours(ours, ids[0].tolist())
        cached = theirs.generate(ids, **GREEDY)
        assert cached[0, 6:].tolist() == wanted
        assert torch.equal(theirs.generate(ids, use_cache=False, **GREEDY), cached)
        three = theirs.generate(ids, steps=3, **GREEDY)
        assert three[0, 6:].tolist() == greedy_of_ours(ours, ids[0].tolist(), steps=3)
    assert len(depths) > 1 or ours.config.halt_max_steps == 1


@pytest.mark.parametrize("changes", [{}, RETENTION])
def test_rows_that_halt_at_different_early_steps(changes: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = wide(tmp_path, **changes, halt_max_steps=5)
    ids = words(40, 6, 3)
    depths = theirs(ids, steps="halting").steps
    few = sorted({*depths.tolist()} - {5})[:2]
    assert len(few) == 2  # and the cache has states of steps that no row takes
    ids = torch.stack([ids[depths == depth][0] for depth in few])
    got = theirs.generate(ids, **GREEDY)
    assert torch.equal(theirs.generate(ids, use_cache=False, **GREEDY), got)
    for row, depth, one in zip(ids, few, got, strict=True):
        wanted = greedy_of_ours(ours, row.tolist())
        assert one[6:].tolist() == wanted
        whole = row.tolist()
        for _ in wanted:
            logits = ours(torch.tensor([whole]), steps=depth)
            whole.append(int(logits[0, -1].argmax()))
        assert whole[6:] == wanted


@torch.no_grad()
def test_a_cache_has_a_slot_for_every_block_of_every_call(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    cache, ids = DynamicCache(config=theirs.config), words(2, 12)
    wanted = theirs(ids).logits
    got = [theirs(part, past_key_values=cache).logits for part in ids.split([5, 4, 1, 1, 1], 1)]
    assert len(cache.layers) == 3 * ours.config.blocks_per_step
    assert all(layer.get_seq_length() == 12 for layer in cache.layers)
    torch.testing.assert_close(torch.cat(got, 1), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_retention_has_a_state_for_every_block_of_every_call(tmp_path: Path) -> None:
    ours, theirs = wide(tmp_path, **RETENTION)
    each = ours.config.blocks_per_step
    cache, made = DynamicCache(), []
    new_state = theirs.model.new_state
    theirs.model.new_state = lambda *a, **more: (made.append(1), new_state(*a, **more))[1]
    wanted = theirs(words(2, 12)).logits
    parts = words(2, 12).split([5, 4, 1, 1, 1], 1)
    got = [theirs(part, past_key_values=cache).logits for part in parts]
    torch.testing.assert_close(torch.cat(got, 1), wanted, atol=1e-5, rtol=1e-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [12] * 3 * each
    assert len(made) == 1  # the later calls have the states of the first
    theirs(words(2, 1), past_key_values=cache, steps=2)  # fewer steps take some of the states
    with pytest.raises(ConfigError, match="fewer steps"):
        theirs(words(2, 1), past_key_values=cache)  # whose others have not seen that token


def test_generation_reads_every_token_once(tmp_path: Path) -> None:
    _, theirs = both(tmp_path)
    read = []
    theirs.model.embedding.register_forward_hook(lambda *_: pytest.fail("embed() is functional"))
    original = theirs.model.embed
    theirs.model.embed = lambda ids, *more: (read.append(ids.shape[1]), original(ids, *more))[1]
    theirs.generate(words(1, 6), **GREEDY)
    assert read == [6] + [1] * 8


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, SINGLE, HRM_TEXT])
def test_padding_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    _, theirs = both(tmp_path, **changes)
    lengths = [3, 8, 5]
    rows = [words(1, length, length)[0] for length in lengths]
    left = torch.stack([F.pad(row, (8 - len(row), 0), value=7) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (8 - len(row), 0)) for row in rows])
    got = theirs.generate(left, attention_mask=mask, **GREEDY)
    assert torch.equal(theirs.generate(left, attention_mask=mask, use_cache=False, **GREEDY), got)
    for row, output in zip(rows, got, strict=True):
        alone = theirs.generate(row[None], **GREEDY)
        assert output[8:].tolist() == alone[0, len(row) :].tolist()
    right = torch.stack([F.pad(row, (0, 8 - len(row)), value=7) for row in rows])
    for side, its_mask in ((left, mask), (right, mask.flip(1))):
        logits = theirs(side, attention_mask=its_mask).logits
        for row, its, one in zip(rows, logits, its_mask.bool(), strict=True):
            torch.testing.assert_close(its[one], theirs(row[None]).logits[0], atol=1e-5, rtol=1e-5)


def test_training_with_padding_is_training_without(tmp_path: Path) -> None:
    _, theirs = both(tmp_path)
    ids = words(1, 6)
    theirs(ids, labels=ids).loss.backward()
    wanted = {n: p.grad.clone() for n, p in theirs.named_parameters() if p.grad is not None}
    theirs.zero_grad()
    padded, mask = F.pad(ids, (4, 0)), F.pad(torch.ones_like(ids), (4, 0))
    labels = F.pad(ids[:, 1:], (5, 0), value=-100)  # no padding says the first token
    theirs(padded, attention_mask=mask, labels=labels).loss.backward()
    for name, parameter in theirs.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_beams_and_samples(tmp_path: Path) -> None:
    _, theirs = both(tmp_path)
    ids = words(2, 5)
    beams = theirs.generate(ids, num_beams=3, **GREEDY)
    assert torch.equal(theirs.generate(ids, num_beams=3, use_cache=False, **GREEDY), beams)
    torch.manual_seed(0)
    drawn = theirs.generate(ids, **GREEDY | {"do_sample": True})
    torch.manual_seed(0)
    again = theirs.generate(ids, use_cache=False, **GREEDY | {"do_sample": True})
    assert torch.equal(drawn, again)


def test_fewer_steps_think_less(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    ids = words(1, 6)
    torch.testing.assert_close(theirs(ids, steps=1).logits, ours(ids, steps=1))
    one = theirs.generate(ids, steps=1, **GREEDY)
    assert torch.equal(theirs.generate(ids, steps=1, use_cache=False, **GREEDY), one)


def test_a_kept_cache_is_gone_on_with(tmp_path: Path) -> None:
    _, theirs = both(tmp_path)
    ids = words(1, 4)
    first = theirs.generate(ids, steps=2, return_dict_in_generate=True, **GREEDY)
    whole = torch.ones_like(first.sequences)
    more = {"steps": 2, "attention_mask": whole, **GREEDY, "max_new_tokens": 5}
    wanted = theirs.generate(first.sequences, use_cache=False, **more)
    kept = first.past_key_values
    assert torch.equal(theirs.generate(first.sequences, past_key_values=kept, **more), wanted)


@torch.no_grad()
def test_bfloat16_computes_in_bfloat16(tmp_path: Path) -> None:
    ours, _ = both(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    logits = theirs(words()).logits
    assert theirs.model.compute_dtype is torch.bfloat16
    assert (logits - ours(words())).std() < 0.1 * logits.std()


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_read(tied: bool, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path / "ours", tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    read = interop.load_model(tmp_path / "theirs")
    assert read.config == ours.config
    wanted = ours.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read.state_dict().items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(words()).logits, ours(words()))


def test_a_new_model_begins_as_ours(tmp_path: Path) -> None:
    save(model_of(small()), tmp_path)
    new = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).model
    assert torch.equal(new.rope_2sc, model_of(small()).rope_2sc)
    assert torch.equal(new.q_head.bias, torch.full((2,), -5.0))
    for name, tensor in model_of(small()).state_dict().items():
        if tensor.numel() > 100:
            torch.testing.assert_close(new.state_dict()[name].std(), tensor.std(), rtol=0.2, atol=0)


def test_refusals(tmp_path: Path) -> None:
    _, theirs = both(tmp_path / "text")
    with pytest.raises(ConfigError, match="context is 20 tokens, and these are 21"):
        theirs(words(1, 21))
    with pytest.raises(ConfigError, match="lower max_new_tokens"):
        theirs.generate(words(1, 18), **GREEDY)
    with pytest.raises(ConfigError, match="one number for each token"):
        theirs(words(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ConfigError, match="DynamicCache"):
        theirs(words(1, 4), past_key_values=StaticCache(config=theirs.config, max_cache_len=9))
    cache = theirs(words(1, 4), steps=1, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="same number of steps"):
        theirs(words(1, 1), past_key_values=cache)
    save(model_of(small(**PUZZLE)), tmp_path / "text")
    with pytest.raises(ConfigError, match="sees the future"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "text")


def test_thimble_alone_does_not_import_transformers() -> None:
    code = "import sys, thimble; assert not {'transformers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
