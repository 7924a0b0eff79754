"""The file is the model: as transformers reads it, and as llama.cpp does where it is installed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

from tests.helpers_cli import Command
from tests.helpers_evaluation import memory_split
from tests.helpers_export import SHAPES, checkpoint_of
from tests.helpers_training import token_directory
from tests.models.test_causal_lm import small
from thimble.errors import ConfigError, DataError, EnvironmentProblem, NotAccepted
from thimble.export import deployment, gguf, gguf_tokenizer, llama_cpp
from thimble.generation.model import load
from thimble.models import interop
from thimble.tokens.tokenizer import load_tokenizer

without_llama_cpp = pytest.mark.skipif(not llama_cpp.available(), reason="needs llama-cpp-python")
TOKENS = token_directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, folder: Path) -> Path:
    return checkpoint_of(folder / request.param, request.param)


@pytest.fixture
def llama(folder: Path) -> Path:
    return checkpoint_of(folder / "llama")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where llama-cpp-python is not installed."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


def value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


# ---------------------------------------------------------------------------------- the file


def test_the_file_says_what_the_configuration_says(
    checkpoint: Path, tmp_path: Path, unchecked: None
) -> None:
    done = gguf.export(checkpoint, type="F32", output=tmp_path / "m.gguf")
    assert "not checked: install thimble-lm[gguf]" in done.facts["checks"]["result"]
    config, reader = SHAPES[checkpoint.name], GGUFReader(done.path)
    told = {
        "general.architecture": "llama",
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.block_count": config.num_hidden_layers,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: value(reader, key) for key in told} == pytest.approx(told)
    names = [tensor.name for tensor in reader.tensors]
    assert ("output.weight" in names) is not config.tie_word_embeddings
    assert sum(int(np.prod(t.shape)) for t in reader.tensors) == config.num_parameters


def test_the_tokenizer_is_in_the_file(llama: Path, tmp_path: Path, unchecked: None) -> None:
    reader = GGUFReader(gguf.export(llama, output=tmp_path / "m.gguf").path)
    tokenizer = load_tokenizer(llama)
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert tokens[: tokenizer.vocab_size] == list(tokenizer.vocabulary())
    assert len(tokens) == len(set(tokens)) == SHAPES["llama"].vocab_size
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == gguf_tokenizer.CONTROL] == [
        "<|endoftext|>",
        "<|pad|>",
        "<|unk|>",
    ]
    unused = len(tokens) - tokenizer.vocab_size
    assert kinds.count(gguf_tokenizer.UNUSED) == unused > 0
    assert value(reader, "tokenizer.ggml.bos_token_id") == tokenizer.eot_id
    assert value(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eot_id
    assert "Question: " in value(reader, "tokenizer.chat_template")


@torch.no_grad()
@pytest.mark.parametrize("shape", ["llama", "untied"])
def test_transformers_reads_the_same_model_from_it(
    shape: str, folder: Path, tmp_path: Path, unchecked: None
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = checkpoint_of(folder / shape, shape)
    gguf.export(checkpoint, type="F32", output=tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = interop.load_model(checkpoint)(ids)
    torch.testing.assert_close(theirs(ids).logits, ours, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("type", "step"), [("F32", 0.0), ("F16", 2**-10), ("Q8_0", 1 / 127)])
def test_weights_are_as_near_as_the_type_allows(
    llama: Path, tmp_path: Path, unchecked: None, type: str, step: float
) -> None:
    """Half a step of the largest weight of each row's block, and the norms exactly."""
    done = gguf.export(llama, type=type, output=tmp_path / "m.gguf")
    model = load(llama, device="cpu")
    exact = gguf.to_gguf_tensors(interop.to_native_tensors(model.network), model.config)
    seen = set()
    for tensor in GGUFReader(done.path).tensors:
        found, wanted = dequantize(tensor.data, tensor.tensor_type), exact.pop(tensor.name)
        # The scale of a block of Q8_0 is a float16 itself.
        bound = np.abs(wanted).max() * (step / 2 * 1.01 + (2**-11 if type == "Q8_0" else 0))
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= (bound if wanted.ndim > 1 else 0)
        seen.add((wanted.ndim, tensor.tensor_type.name))
    assert not exact
    assert seen == {(1, "F32"), (2, type)}


def test_neighbours_of_the_file_are_halves_of_a_head() -> None:
    rows = np.arange(2 * 6)[:, None] * np.ones(3)  # two heads of six channels
    assert gguf.interleave(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# ------------------------------------------------------------------------------ in llama.cpp


@without_llama_cpp
@pytest.mark.parametrize("type", ["F16", "F32"])
def test_llama_cpp_decides_as_the_model_does(checkpoint: Path, tmp_path: Path, type: str) -> None:
    done = gguf.export(checkpoint, type=type, output=tmp_path / "m.gguf", tokens=TOKENS())
    checks = done.facts["checks"]
    assert checks["result"] == "passed"
    assert checks["logits"]["argmax_agreement"] >= 0.999
    assert checks["logits"]["largest_logit_difference"] < 0.1
    assert checks["logits"]["mean_kl_nats"] < 1e-4
    assert checks["greedy"]["tokens"] >= 200
    assert checks["greedy"]["differing"] == checks["greedy"]["ties"]
    assert checks["tokenizer"]["documents"] > 0
    assert checks["tokenizer"]["differing"] == 0
    assert done.facts["speed"]["generated_tokens_per_second"] > 0
    assert done.facts["warnings"] == []


@without_llama_cpp
@pytest.mark.parametrize(
    ("shape", "type", "types", "warned"),
    [
        ("llama", "Q8_0", {"Q8_0"}, ""),
        ("tiny", "Q4_K_M", {"Q4_K", "Q6_K", "Q5_0"}, ": blk.*.attn_output (rows of 384)"),
        ("tiny", "q6_k", {"Q6_K", "Q8_0"}, ": blk.*.attn_output (rows of 384)"),
        ("llama", "Q4_K_S", {"Q5_0", "Q5_1", "Q8_0"}, ", blk.*.ffn_down (rows of 96)"),
    ],
)
def test_quantized_types_are_measured(
    folder: Path, tmp_path: Path, shape: str, type: str, types: set[str], warned: str
) -> None:
    checkpoint = checkpoint_of(folder / shape, shape)
    done = gguf.export(checkpoint, type=type, output=tmp_path / "m.gguf", tokens=TOKENS())
    assert set(done.facts["tensor_types"]) == types | {"F32"}
    assert done.facts["checks"]["result"] == "measured"
    logits = done.facts["checks"]["logits"]
    assert 0 < logits["mean_kl_nats"] < 0.1
    assert logits["perplexity"]["checkpoint"] != logits["perplexity"]["file"]
    assert [text.endswith(warned) for text in done.facts["warnings"]] == [True] * bool(warned)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.gguf", "m.gguf.json"]


@without_llama_cpp
def test_a_file_that_is_another_model_gets_no_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "interleave", lambda rows, heads: rows)
    with pytest.raises(NotAccepted, match=r"likeliest token is the same in .* greedy tokens are"):
        gguf.export(llama, output=tmp_path / "new" / "m.gguf", tokens=TOKENS())
    assert list(tmp_path.iterdir()) == []


@without_llama_cpp
def test_a_file_with_another_tokenizer_gets_no_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*args: Any) -> gguf_tokenizer.Vocabulary:
        vocabulary = gguf_tokenizer.vocabulary_of(*args)
        tokens = list(vocabulary.tokens)
        a, the = tokens.index("Ġa"), tokens.index("Ġthe")
        tokens[a], tokens[the] = tokens[the], tokens[a]
        return replace(vocabulary, tokens=tokens)

    monkeypatch.setattr(gguf, "vocabulary_of", other)
    with pytest.raises(NotAccepted, match=r"ids differ from the tokenizer's in \d+ of \d+ doc"):
        gguf.export(llama, type="Q8_0", output=tmp_path / "m.gguf", tokens=TOKENS())
    assert list(tmp_path.iterdir()) == []


@without_llama_cpp
def test_a_file_llama_cpp_does_not_load_gets_no_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gguf.NAMES, "mlp.up_proj", "ffn_upwards")
    with pytest.raises(NotAccepted, match=r"does not load the file: .*ffn_up"):
        gguf.export(llama, output=tmp_path / "m.gguf", tokens=TOKENS())
    assert list(tmp_path.iterdir()) == []


@without_llama_cpp
def test_logits_that_are_no_numbers_are_refused_in_any_type(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = llama_cpp.Engine.logits
    monkeypatch.setattr(
        llama_cpp.Engine, "logits", lambda *args, **options: logits(*args, **options) / 0
    )
    with pytest.raises(NotAccepted, match="logits are not all finite"):
        gguf.export(llama, type="Q8_0", output=tmp_path / "m.gguf", tokens=TOKENS())
    assert list(tmp_path.iterdir()) == []


@without_llama_cpp
def test_without_held_out_tokens_it_is_loaded_and_said(llama: Path, tmp_path: Path) -> None:
    done = gguf.export(llama, output=tmp_path / "m.gguf")
    assert "names no held-out tokens; give some with --tokens FOLDER" in done.facts["warnings"][0]
    assert done.facts["checks"]["result"] == done.facts["warnings"][0]
    assert done.facts["speed"]["prompt_tokens_per_second"] > 0


@without_llama_cpp
def test_bos_comes_first_and_special_tokens_in_text_are_text(llama: Path, tmp_path: Path) -> None:
    done = gguf.export(llama, output=tmp_path / "m.gguf")
    tokenizer = load_tokenizer(llama)
    text = "a <|endoftext|> <|pad|> b"
    with llama_cpp.opened(done.path, 48) as engine:
        with_bos = engine.llama.tokenize(text.encode(), add_bos=True, special=False)
        assert with_bos == [tokenizer.eot_id, *tokenizer.encode(text)]
        assert engine.tokenize("") == []


@without_llama_cpp
def test_documents_with_long_runs_are_counted_apart(llama: Path, tmp_path: Path) -> None:
    done = gguf.export(llama, output=tmp_path / "m.gguf")
    model = load(llama, device="cpu")
    texts = ["the kernel", "kernel" * 20, "a driver"]
    split: Any = memory_split([model.tokenizer.encode(text) for text in texts])
    with llama_cpp.opened(done.path, 48) as engine:
        found = llama_cpp.compare_tokenizers(engine, model, split)
    assert (found["documents"], found["differing"], found["differing_by_long_runs"]) == (3, 1, 1)


# ------------------------------------------------------------------ the comparison can fail


class Noisy:
    """An engine that is the model itself, with something added to its logits."""

    def __init__(self, model: Any, noise: float) -> None:
        self.model, self.noise, self.ids = model, noise, []
        self.draw = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def logits(self, ids: list[int], *, go_on: bool = False) -> torch.Tensor:
        self.ids = [*self.ids, *ids] if go_on else list(ids)
        logits = self.model.network(torch.tensor([self.ids]))[0, -len(ids) :]
        return logits + self.noise * torch.randn(logits.shape, generator=self.draw)


@pytest.mark.parametrize(("noise", "same"), [(0.0, True), (3.0, False)])
def test_the_comparison_sees_another_model(llama: Path, noise: float, same: bool) -> None:
    model, split = load(llama, device="cpu"), deployment.TokenSplit(TOKENS(), "test")
    engine: Any = Noisy(model, noise)
    logits = llama_cpp.compare_logits(engine, model, split, 16)
    greedy = llama_cpp.compare_greedy(engine, model, split, 48)
    assert logits["tokens"] == len(split)
    assert (logits["argmax_agreement"] == 1) is same
    assert (logits["mean_kl_nats"] < 1e-6) is same
    assert greedy["tokens"] >= 200
    assert (greedy["differing"] == 0) is same
    assert greedy["differing"] > greedy["ties"] or same


def test_perplexity_is_that_of_the_evaluation(llama: Path) -> None:
    from thimble.evaluation.perplexity import evaluate_split

    model, split = load(llama, device="cpu"), deployment.TokenSplit(TOKENS(), "test")
    engine: Any = Noisy(model, 0.0)
    found = llama_cpp.compare_logits(engine, model, split, 16)["perplexity"]
    wanted = evaluate_split(model.nll, split, 16, 4)["perplexity"]
    assert found["checkpoint"] == pytest.approx(wanted, rel=1e-4)
    assert found["file"] == pytest.approx(wanted, rel=1e-4)


def test_a_tie_is_told_from_a_difference(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is a tie when every gap is small, nothing when none is."""
    model, split = load(llama, device="cpu"), deployment.TokenSplit(TOKENS(), "test")
    engine: Any = Noisy(model, 3.0)
    monkeypatch.setattr(llama_cpp, "GREEDY_TOKENS", 36)
    for tie, all_of_them in ((1e9, True), (0.0, False)):
        monkeypatch.setattr(llama_cpp, "TIE", tie)
        greedy = llama_cpp.compare_greedy(engine, model, split, 48)
        assert (greedy["ties"] == greedy["differing"] > 0) is all_of_them
        assert len(greedy["tie_gaps"]) == greedy["ties"]


# ---------------------------------------------------------------------------------- bad input


@pytest.fixture
def thimble_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def test_an_unknown_type_is_answered_with_the_nearest(
    thimble_command: Command, llama: Path
) -> None:
    answer = thimble_command("export", "gguf", str(llama), "--type", "Q4_KM")
    assert answer.status == 2
    assert f"thimble export gguf {llama} --type Q4_K_M" in answer.err
    with pytest.raises(ConfigError, match="no GGUF type Q3"):
        gguf.export(llama, type="Q3")


@pytest.mark.parametrize("there", ["m.gguf", "m.gguf.json"])
def test_what_exists_is_not_overwritten(llama: Path, tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(DataError, match=rf"{there} exists already. Remove it, or choose .* -o"):
        gguf.export(llama, output=tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "broken"), RuntimeError])
@pytest.mark.parametrize("where", ["pack", "tensor_types"])
def test_an_interrupted_export_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, where: str
) -> None:
    def stop(*args: Any) -> None:
        raise error

    monkeypatch.setattr(gguf, where, stop)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        gguf.export(llama, output=tmp_path / "new" / "m.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_M"])
def test_a_shape_without_whole_blocks_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type: str
) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    odd = small(vocab_size=320, hidden_size=64, intermediate_size=170, num_attention_heads=4)
    checkpoint = checkpoint_of(tmp_path / "odd", odd)
    with pytest.raises(DataError) as error:
        gguf.export(checkpoint, type=type, output=tmp_path / "m.gguf")
    assert f"{type} needs rows of a multiple of 32" in str(error.value)
    assert "blk.*.ffn_down.weight: rows of 170" in str(error.value)
    assert "attn_q" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_another_architecture_is_refused(llama: Path, tmp_path: Path) -> None:
    other = checkpoint_of(tmp_path / "gpt2")
    config = json.loads((other / "config.json").read_text()) | {"model_type": "gpt2"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="is a gpt2"):
        gguf.export(other, output=tmp_path / "m.gguf")


@pytest.mark.parametrize(("module", "type"), [("gguf", "F16"), ("llama_cpp", "Q4_K_M")])
def test_a_missing_package_is_named_with_its_extra(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, type: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'thimble-lm\[gguf\]'"):
        gguf.export(llama, type=type, output=tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("weight", "type", "advice"), [(1e5, "F16", "as F32"), (float("nan"), "F32", "broken")]
)
def test_a_weight_beyond_the_type_is_refused(weight: float, type: str, advice: str) -> None:
    with pytest.raises(DataError, match=f"x.weight holds .* beyond {type}.*{advice}"):
        gguf.pack("x.weight", np.array([[1.0, weight]], dtype=np.float32), type)
