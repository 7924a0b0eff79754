"""Checkpoints: transformers reads ours and we read those of transformers, with the same logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.test_causal_lm import model_of, small
from thimble.config.load import load
from thimble.config.model import ModelConfig
from thimble.errors import DataError
from thimble.models import interop
from thimble.tokens.tokenizer import train as train_tokenizer
from thimble.training.checkpoint import save_model

TEXTS = ["the kernel loads a module", "a driver for the device", "mount the root disk"] * 20

SHAPES = {
    "llama": small(vocab_size=300, hidden_size=48),
    "mistral": small(vocab_size=300, hidden_size=40),  # 6 heads do not divide 40
    "untied": small(vocab_size=300, hidden_size=48, tie_word_embeddings=False, rope_theta=5e5),
}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    save_model(directory, model_of(SHAPES[request.param]), train_tokenizer(TEXTS, 300))
    return directory


@torch.no_grad()
def test_transformers_gives_the_same_logits(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert theirs.dtype is torch.float32
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("the device loads\n  a disk", return_tensors="pt").input_ids
    ids = torch.cat([ids, ids.flip(1)], dim=1)
    ours = interop.load_model(checkpoint)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_loads_where_thimble_is_not_installed(checkpoint: Path) -> None:
    code = (
        "import sys; sys.modules['thimble'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(checkpoint)!r})\n"
        "ids = tokenizer('the kernel', return_tensors='pt').input_ids\n"
        "out = model.generate(ids, max_new_tokens=5, do_sample=False)\n"
        "assert out.shape[1] > ids.shape[1]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_reads_what_transformers_wrote(kind: str, tmp_path: Path) -> None:
    import transformers

    shape = {
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**shape, rms_norm_eps=1e-5, tie_word_embeddings=True)
        theirs = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.MistralConfig(**shape, head_dim=16, sliding_window=None)
        theirs = transformers.MistralForCausalLM(config)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if kind == "mistral" else "1GB")
    if kind == "mistral":
        assert (tmp_path / "model.safetensors.index.json").exists()
    ids = torch.randint(0, 99, (2, 30), generator=torch.Generator().manual_seed(6))
    ours = interop.load_model(tmp_path)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", ["slm_nano", "slm_tiny", "slm_small", "slm_medium", "slm_large"])
def test_every_size_is_accepted_by_transformers(recipe: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = load(recipe).model
    native = interop.to_native_config(model, {"bos": 0, "eos": 0, "pad": 1})
    kind = native.pop("model_type")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **native))
    assert sum(p.numel() for p in theirs.parameters()) == model.num_parameters
    assert interop.from_native_config({**native, "model_type": kind}, "here") == model


def write_config(directory: Path, **changes: object) -> None:
    native = interop.to_native_config(small(), {"bos": 0, "eos": 0, "pad": None})
    (directory / "config.json").write_text(json.dumps({**native, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "is a gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"num_attention_heads": "six"}, "not a usable configuration"),
    ],
)
def test_refuses_other_architectures(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(DataError, match=words):
        interop.load_model(tmp_path)


def saved(directory: Path, config: ModelConfig | None = None) -> Path:
    save_model(directory, model_of(config or small(vocab_size=300)), train_tokenizer(TEXTS, 300))
    return directory


def test_refuses_an_empty_folder_and_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        interop.load_model(tmp_path)
    with pytest.raises(DataError, match="no checkpoint at"):
        interop.load_model(tmp_path / "nowhere")


def test_refuses_truncated_weights(tmp_path: Path) -> None:
    weights = saved(tmp_path) / interop.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged or cut off"):
        interop.load_model(tmp_path)


def test_refuses_a_pickle_without_opening_it(tmp_path: Path) -> None:
    (saved(tmp_path) / interop.WEIGHTS).unlink()
    witness = tmp_path / "opened"

    class Trap:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (witness,))

    torch.save({"weights": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="a pickle"):
        interop.load_model(tmp_path)
    assert not witness.exists()


def test_refuses_tensors_that_do_not_fit(tmp_path: Path) -> None:
    saved(tmp_path)
    native = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"num_hidden_layers": 4}, "lacks"),
        ({"num_hidden_layers": 2}, "unknown tensor"),
        ({"intermediate_size": 64}, "has shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**native, **change}))
        with pytest.raises(DataError, match=words):
            interop.load_model(tmp_path)
