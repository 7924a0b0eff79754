from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers_cli import Command
from tests.helpers_evaluation import best, finished_run, reseal
from thimble import api, tokens
from thimble.artifacts import damaged_files, read_json, read_manifest, write_json
from thimble.errors import ConfigError, DataError
from thimble.evaluation.perplexity import evaluate_model
from thimble.generation.model import load
from thimble.quantization import gptq, ladder, packed
from thimble.terminal import show
from thimble.tokens.shards import TokenSplit


@pytest.fixture(scope="session")
def all_rungs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ladder.Quantization:
    """A gate that nothing passes, so that every rung is measured."""
    output = tmp_path_factory.mktemp("all") / "out"
    return ladder.quantize(llama, output=output, calibration_samples=16, max_rise=-1.0)


@pytest.fixture(params=["llama", "mistral"])
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def reference_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def ours_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, "cpu").network(ids)


def test_int8_passes_and_everything_it_says_is_so(
    run: Path, long_tokens: str, tmp_path: Path
) -> None:
    result = ladder.quantize(run, bits=8, output=tmp_path / "out", calibration_samples=32)
    (rung,) = result.rungs
    assert result.accepted
    assert abs(rung.rise) < 0.02
    assert rung.bits == {"attention": 8, "mlp": 8}
    model = load(result.path, "cpu")
    figures = evaluate_model(model.nll, model, TokenSplit(long_tokens, "test"), 16)
    assert figures["perplexity"] == pytest.approx(rung.perplexity, rel=1e-6)
    assert figures["tokens"] == result.test_tokens
    assert rung.rise == rung.perplexity / rung.perplexity_before - 1
    file = result.path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert rung.bytes == file.stat().st_size - header == rung.bytes_expected
    whole = read_json(best(run) / "manifest.json")["counts"]["parameters"]
    assert result.compression["float32"] == pytest.approx(4 * whole / rung.bytes)
    manifest = read_manifest(result.path, "quantized", make="")
    assert not damaged_files(result.path, manifest, hashes=True)
    assert manifest["accepted"]
    assert read_json(result.path / ladder.SUMMARY) == json.loads(json.dumps(result.to_dict()))
    assert model.generate("the kernel", max_tokens=4, seed=1)


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_loads_it_and_gives_our_logits(run: Path, tmp_path: Path, bits: int) -> None:
    result = ladder.quantize(
        run, bits=bits, output=tmp_path / "out", calibration_samples=16, max_rise=1.0
    )
    ids = torch.arange(2, 18).view(1, 16)
    ours = ours_logits(result.path, ids)
    assert (reference_logits(result.path, ids) - ours).abs().max() < 1e-3
    assert (ours_logits(best(run), ids) - ours).abs().max() > 1e-3  # it is another model


def test_the_ladder_is_walked_to_the_first_rung_that_passes(
    llama: Path, all_rungs: ladder.Quantization, tmp_path: Path
) -> None:
    names = [rung.name for rung in all_rungs.rungs]
    assert names == ["int4", "int4", "int8-attention-int4-mlp", "int8"]
    assert [rung.calibration_windows for rung in all_rungs.rungs] == [16, 32, 32, 32]
    rises = [rung.rise for rung in all_rungs.rungs]
    assert min(rises[:2]) > rises[2] > rises[3]
    sizes = [rung.bytes for rung in all_rungs.rungs]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]
    ids = torch.arange(2, 18).view(1, 16)
    for last in (2, 3):
        between = (rises[last] + min(rises[:last])) / 2
        result = ladder.quantize(
            llama, output=tmp_path / str(last), calibration_samples=16, max_rise=between
        )
        assert result.accepted
        assert [rung.passed for rung in result.rungs] == [False] * last + [True]
        assert [rung.rise for rung in result.rungs] == pytest.approx(rises[: last + 1])
        chosen = result.rungs[-1]
        config = read_json(result.path / "config.json")["quantization_config"]
        kinds = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
        assert kinds == set(chosen.bits.values())
        difference = reference_logits(result.path, ids) - ours_logits(result.path, ids)
        assert difference.abs().max() < 1e-3


def test_when_nothing_passes_it_is_said_plainly(
    all_rungs: ladder.Quantization, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not all_rungs.accepted
    assert not any(rung.passed for rung in all_rungs.rungs)
    assert show(all_rungs, as_json=False) == 3
    shown = capsys.readouterr().out
    assert "not accepted" in shown
    assert "Nothing tried passed" in shown
    assert "NOT ACCEPTED" in (all_rungs.path / "README.md").read_text()
    assert not read_json(all_rungs.path / ladder.SUMMARY)["accepted"]
    assert show(all_rungs, as_json=True) == 3
    assert len(json.loads(capsys.readouterr().out)["rungs"]) == 4


def test_a_size_that_is_not_as_expected_fails() -> None:
    bits = {"attention": 4, "mlp": 4}
    for size, passed in ((1000, True), (1099, True), (1101, False), (899, False)):
        rung = ladder._judged("int4", bits, 16, 10.0, 10.1, 1000, size, 1.0, 0.02)
        assert rung.passed == passed
    assert not ladder._judged("int4", bits, 16, 10.0, float("nan"), 9, 9, 1.0, 0.02).passed


def test_the_command_writes_into_the_run_and_refuses_to_write_again(
    llama: Path, thimble_command: Command, tmp_path: Path
) -> None:
    copy = shutil.copytree(llama, tmp_path / "run")
    words = ("quantize", str(copy), "--bits", "8", "--calibration-samples", "16", "--json")
    answer = thimble_command(*words)
    assert answer.status == 0, answer.err
    said = json.loads(answer.out)
    assert said["accepted"]
    target = copy / "quantized" / f"int8-{best(copy).name}"
    assert said["path"] == str(target)
    assert "neural_compressor" not in answer.err
    digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    answer = thimble_command(*words)
    assert answer.status == 5
    assert "exists already" in json.loads(answer.out)["error"]
    assert hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest() == digest
    assert "quantized, not a checkpoint" in thimble_command("quantize", str(target)).err
    assert json.loads(thimble_command("inspect", str(target), "--json").out)["kind"] == "quantized"


@pytest.mark.parametrize("place", ["write_manifest", "quantize"])
def test_an_interrupted_run_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    owner: Any = ladder.artifacts if place == "write_manifest" else gptq
    monkeypatch.setattr(owner, place, stop)
    with pytest.raises(KeyboardInterrupt):
        ladder.quantize(llama, bits=8, output=tmp_path / "a" / "out", calibration_samples=16)
    assert not list(tmp_path.rglob("*.*"))


def test_too_short_a_validation_split_is_refused() -> None:
    with pytest.raises(DataError, match="8 windows of 16; calibration wants at least 16"):
        ladder.quantize(finished_run())


def test_fewer_windows_than_asked_for_are_all_used_and_said(
    llama: Path, long_tokens: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = len(TokenSplit(long_tokens, "val")) // 16
    result = ladder.quantize(llama, output=tmp_path / "out", max_rise=-1.0)
    assert f"only {there} windows" in result.notes[0]
    assert "no more validation text" in result.notes[1]
    assert [rung.calibration_windows for rung in result.rungs] == [there] * 3
    assert result.notes == read_json(result.path / ladder.SUMMARY)["notes"]


@pytest.mark.parametrize("options", [{"bits": 5}, {"calibration_samples": 15}])
def test_wrong_options_are_refused(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        api.quantize(tmp_path, **options)


def test_a_damaged_checkpoint_and_other_tokens_are_refused(llama: Path, tmp_path: Path) -> None:
    run = shutil.copytree(llama, tmp_path / "run")
    file = best(run) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        ladder.quantize(run)
    reseal(best(run))
    manifest = read_json(best(run) / "manifest.json")
    manifest["inputs"]["tokens"] = "others"
    write_json(best(run) / "manifest.json", manifest)
    with pytest.raises(DataError, match="is not what"):
        ladder.quantize(run)
    with pytest.raises(DataError, match="no checkpoint or run"):
        ladder.quantize(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a complete checkpoint"):
        ladder.quantize(tmp_path)


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(
    llama: Path, long_tokens: str, tmp_path: Path
) -> None:
    run = shutil.copytree(llama, tmp_path / "run")
    corpus = Path(long_tokens).parent / "corpus"
    other = tokens.build(corpus, output=tmp_path / "tokens", vocab_size=280, workers=1)
    shutil.copyfile(other / "tokenizer.json", best(run) / "tokenizer.json")
    reseal(best(run))
    with pytest.raises(DataError, match="is not the one these tokens were made with"):
        ladder.quantize(run, calibration_samples=16)


def test_calibration_never_sees_the_test_split(
    llama: Path, long_tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    original = gptq.quantize

    def note(model: Any, windows: torch.Tensor, *rest: Any) -> Any:
        seen.append(windows)
        return original(model, windows, *rest)

    monkeypatch.setattr(gptq, "quantize", note)
    ladder.quantize(llama, bits=8, output=tmp_path / "out", calibration_samples=16)
    val = TokenSplit(long_tokens, "val").tokens
    windows = {tuple(val[i : i + 16].tolist()) for i in range(0, len(val) - 15, 16)}
    assert seen[0].shape == (16, 16)
    assert {tuple(row) for row in seen[0].tolist()} <= windows


def test_weights_of_another_program_in_the_same_format_load(
    llama: Path, all_rungs: ladder.Quantization, tmp_path: Path
) -> None:
    """What transformers saves of a quantized model is the same model to us."""
    native = AutoModelForCausalLM.from_pretrained(all_rungs.path, dtype=torch.float32)
    folder = shutil.copytree(all_rungs.path, tmp_path / "again")
    native.save_pretrained(folder)
    assert packed.FORMAT in (folder / "config.json").read_text()
    ids = torch.arange(2, 18).view(1, 16)
    assert torch.allclose(ours_logits(folder, ids), ours_logits(all_rungs.path, ids), atol=1e-4)
