"""Retention in checkpoints: for our loader and transformers the same numbers, the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import thimble.hub as hub
from tests import helpers_distill
from tests.models.test_interop_recursive import change
from tests.training.test_distillation import config
from thimble.artifacts import write_json
from thimble.errors import ConfigError, DataError
from thimble.generation import model as generation
from thimble.generation.sampling import generate_ids
from thimble.models import interop
from thimble.training import train

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}
CHANGES = [
    pytest.param([], id="retention"),
    pytest.param(["model.value_head_dim=16", "model.tie_word_embeddings=false"], id="wide"),
    pytest.param(helpers_distill.RECURSIVE, id="recursive"),
]


@pytest.fixture(scope="module", params=CHANGES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = train(
        config(tmp_path_factory.mktemp("run"), None, "training.max_steps=8", *request.param)
    )
    assert run.latest is not None
    return run.latest


def ids_of(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 300, (rows, time), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_transformers_gives_the_same_logits(checkpoint: Path) -> None:
    ours = interop.load_model(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(theirs, hub.ThimbleRetNetForCausalLM | hub.ThimbleRecursiveForCausalLM)
    ids = ids_of(2, 40)
    assert torch.equal(theirs(ids).logits, ours(ids))
    labels = ids.masked_fill(torch.arange(40) < 5, -100)
    wanted = F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(theirs(ids, labels=labels).loss, wanted)


@torch.no_grad()
def test_a_saved_copy_is_read_by_us(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    ids = ids_of(1, 20)
    assert torch.equal(interop.load_model(tmp_path)(ids), interop.load_model(checkpoint)(ids))
    assert interop.read_config(tmp_path) == interop.read_config(checkpoint)


@torch.no_grad()
def test_greedy_words_are_ours_with_and_without_a_cache(checkpoint: Path) -> None:
    ours = interop.load_model(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    for seed in range(3):
        ids = ids_of(1, 6, seed)
        options = {"max_tokens": 9, "temperature": 0, "top_k": 0, "top_p": 1, "seed": 0}
        wanted = list(generate_ids(ours, ids[0].tolist(), **options))
        cached = theirs.generate(ids, **GREEDY)
        assert cached[0, 6:].tolist() == wanted[: len(cached[0]) - 6]
        assert torch.equal(theirs.generate(ids, use_cache=False, **GREEDY), cached)


@torch.no_grad()
def test_a_cache_does_not_grow_and_padding_changes_nothing(checkpoint: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids, cache = ids_of(2, 40), DynamicCache()
    wanted, got, sizes = theirs(ids).logits, [], set()
    for part in ids.split([20, 9, 10, 1], 1):
        got.append(theirs(part, past_key_values=cache).logits)
        sizes.add(sum(layer.state.memory.numel() for layer in cache.layers))
    torch.testing.assert_close(torch.cat(got, 1), wanted, atol=1e-4, rtol=1e-4)
    assert len(sizes) == 1
    short = ids_of(1, 5, 3)
    left = torch.cat([F.pad(short, (7, 0), value=9), ids_of(1, 12, 4)])
    mask = torch.ones_like(left)
    mask[0, :7] = 0
    alone = theirs.generate(short, **GREEDY)[0, 5:]
    padded = theirs.generate(left, attention_mask=mask, **GREEDY)[0, 12:]
    assert padded[: len(alone)].tolist() == alone.tolist()
    beams = theirs.generate(short, num_beams=3, **GREEDY)
    assert torch.equal(beams, theirs.generate(short, num_beams=3, use_cache=False, **GREEDY))


@torch.no_grad()
def test_padding_between_tokens_is_refused_and_after_them_is_nothing(checkpoint: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    short = ids_of(1, 5)
    ids, mask = F.pad(short, (0, 3), value=9), F.pad(torch.ones_like(short), (0, 3))
    right = theirs(ids, attention_mask=mask).logits[:, :5]
    torch.testing.assert_close(right, theirs(short).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match='padding_side = "left"'):
        theirs.generate(ids, attention_mask=mask, **GREEDY)
    mask[0, 6] = 1
    with pytest.raises(ConfigError, match="Padding stands between the tokens"):
        theirs(ids, attention_mask=mask)


def test_a_cache_of_another_kind_is_refused(checkpoint: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ConfigError, match="DynamicCache"):
        theirs(ids_of(1, 4), past_key_values=StaticCache(config=theirs.config, max_cache_len=32))


def test_it_writes_beyond_its_context(checkpoint: Path) -> None:
    model = generation.load(checkpoint, device="cpu")
    assert len(model.network.new_state(1)) >= 1
    ids = list(
        generate_ids(model.network, [1, 2], max_tokens=60, temperature=1, top_k=0, top_p=1, seed=3)
    )
    assert len(ids) == 60 > model.config.max_position_embeddings
    assert isinstance(model.generate("the kernel", max_tokens=5), str)


def test_what_knows_attention_only_refuses_it(checkpoint: Path, tmp_path: Path) -> None:
    from thimble.export import gguf, onnx
    from thimble.quantization import ladder

    for call in (
        lambda: gguf.export(checkpoint, output=tmp_path / "x.gguf"),
        lambda: onnx.export(checkpoint, output=tmp_path / "x"),
        lambda: ladder.quantize(checkpoint, output=tmp_path / "q"),
    ):
        with pytest.raises(ConfigError, match="thimble export transformers"):
            call()


def test_a_plain_copy_can_be_exported(checkpoint: Path, tmp_path: Path) -> None:
    from thimble.export import transformers

    transformers.export(checkpoint, tmp_path / "copy")
    ids = ids_of(1, 12)
    assert torch.equal(
        interop.load_model(tmp_path / "copy")(ids), interop.load_model(checkpoint)(ids)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"retention_chunks": 3}, "retention_chunk"),
        ({"hidden_size": "absent"}, "lacks hidden_size"),
        ({"mixer": "attention"}, "not attention"),
        ({"schedule": "recursive"}, "not recursive"),
    ],
)
def test_a_changed_configuration_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = train(config(tmp_path / "run", None, "training.max_steps=1"))
    assert run.latest is not None
    write_json(tmp_path / "config.json", interop.read_json(run.latest / "config.json"))
    change(tmp_path, **changes)
    with pytest.raises(DataError, match=said):
        interop.read_config(tmp_path)
