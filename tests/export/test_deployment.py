"""What every export has in common, and the folders for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers_cli import Command
from tests.helpers_evaluation import best, change_config
from tests.helpers_export import checkpoint_of
from tests.helpers_training import WINDOW, token_directory
from thimble import api, artifacts
from thimble.errors import ConfigError, DataError
from thimble.export import deployment, gguf, llama_cpp
from thimble.models import interop
from thimble.tokens.shards import TokenSplit
from thimble.tokens.tokenizer import load_tokenizer


@pytest.fixture
def thimble_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where llama-cpp-python is not installed."""
    monkeypatch.setattr(llama_cpp, "available", lambda: False)


def test_a_run_is_exported_into_itself(
    run: Path, thimble_command: Command, unchecked: None
) -> None:
    answer = thimble_command("export", "gguf", str(run), "--json")
    assert answer.status == 0, answer.err
    told = json.loads(answer.out)
    file = run / "export" / "slm_nano-F16.gguf"
    assert (told["path"], told["manifest"]) == (str(file), f"{file}.json")
    assert told["file"]["sha256"] == artifacts.sha256_file(file)
    manifest = json.loads(Path(told["manifest"]).read_text())
    assert manifest["kind"] == "deployment"
    assert manifest["file"] == {
        "name": file.name,
        "bytes": file.stat().st_size,
        "sha256": artifacts.sha256_file(file),
    }
    weights = best(run) / interop.WEIGHTS
    assert manifest["source"]["weights"] == {weights.name: artifacts.sha256_file(weights)}
    assert manifest["source"]["step"] == int(best(run).name.removeprefix("step-"))
    model = manifest["model"]
    assert model["parameters"] == interop.read_config(best(run)).num_parameters
    assert (model["vocab_size"], model["max_position_embeddings"]) == (300, 32)
    # 2 (keys, values) x 1 layer x 1 head x 8 channels x 32 positions x 2 bytes
    assert manifest["kv_cache_bytes_at_full_context"] == 1024
    assert {"torch", "gguf", "python"} <= set(manifest["versions"])
    assert answer.out.count("\n") == 1

    answer = thimble_command("export", "gguf", str(run))
    assert answer.status == 5
    assert "exists already" in answer.err


def test_a_checkpoint_elsewhere_is_exported_beside_itself(tmp_path: Path) -> None:
    source = deployment.find_source(checkpoint_of(tmp_path / "mine"))
    assert deployment.choose_target(source, None, "-F16.gguf") == tmp_path / "mine-F16.gguf"
    assert source.config is None


def test_a_damaged_checkpoint_is_not_exported(run: Path) -> None:
    with open(best(run) / interop.WEIGHTS, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(DataError, match=r"is damaged: model\.safetensors does not have the sha256"):
        deployment.find_source(run)


@pytest.mark.parametrize("path", ["nothing", ""])
def test_no_checkpoint_is_said(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"no checkpoint|holds no config\.json"):
        gguf.export(tmp_path / path)


# ------------------------------------------------------------------------ what is held out


def test_held_out_tokens_are_those_of_the_run(run: Path, tokens: Path, tmp_path: Path) -> None:
    source, tokenizer = deployment.find_source(run), load_tokenizer(best(run))
    split = deployment.held_out(source, None, tokenizer)
    assert isinstance(split, TokenSplit)
    assert (split.directory, split.split) == (tokens, "test")
    assert deployment.window_length(source, interop.read_config(best(run))) == WINDOW

    change_config(run, data={"path": str(tmp_path / "gone")})
    reason = deployment.held_out(deployment.find_source(run), None, tokenizer)
    assert isinstance(reason, str)
    assert "There is no tokens at" in reason
    assert "--tokens FOLDER" in reason
    given = deployment.held_out(deployment.find_source(run), token_directory(), tokenizer)
    assert isinstance(given, TokenSplit)


def test_a_foreign_checkpoint_names_no_tokens(tmp_path: Path) -> None:
    source = deployment.find_source(checkpoint_of(tmp_path / "mine"))
    reason = deployment.held_out(source, None, load_tokenizer(source.checkpoint))
    assert reason == "the checkpoint names no held-out tokens; give some with --tokens FOLDER"
    config = interop.read_config(source.checkpoint)
    assert deployment.window_length(source, config) == config.max_position_embeddings


@pytest.mark.parametrize("length", [1, 7, 16, 100, 200])
@pytest.mark.parametrize("tokens", [1, 40, 1000])
def test_windows_are_those_of_the_evaluation(length: int, tokens: int) -> None:
    """Each target follows its input in the stream, no target comes twice, and few are left out."""

    class Stream(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.tokens)

    stream: Any = Stream(tokens=np.arange(100, 200, dtype=np.uint16), eot_id=99)
    seen: list[int] = []
    for inputs, targets in deployment.windows(stream, length, tokens):
        assert len(inputs) == len(targets) <= length
        assert (targets[0] - 100) % length == 0
        assert (inputs + 1 == targets).all()
        seen += targets.tolist()
    assert len(set(seen)) == len(seen)
    assert min(tokens, 100) <= len(seen) < max(tokens + length, 101)
    if tokens == 1000:
        assert len(seen) == 100


# -------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, DataError])
@pytest.mark.parametrize("moment", ["file", "manifest", "rename"])
def test_file_and_manifest_come_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], moment: str
) -> None:
    target = tmp_path / "new" / "m.gguf"
    if moment == "rename":
        replace = artifacts.os.replace

        def stop(before: Path, after: Path) -> None:
            if str(after).endswith(".json"):  # the second of the two
                raise error("stopped")
            replace(before, after)

        monkeypatch.setattr(artifacts.os, "replace", stop)

    def write() -> None:
        with deployment.file_and_manifest(target) as (file, manifest):
            file.write_text("weights")
            if moment == "file":
                raise error("stopped")
            manifest.write_text("{}")
            if moment == "manifest":
                raise error("stopped")

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_file_and_manifest_appear(tmp_path: Path) -> None:
    with deployment.file_and_manifest(tmp_path / "m.gguf") as (file, manifest):
        file.write_text("weights")
        manifest.write_text("{}")
        assert not (tmp_path / "m.gguf").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "m.gguf.json"]


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(DataError), deployment.file_and_manifest(tmp_path / "m.gguf"):
        raise DataError("stopped")
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- transformers


READ = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("write", "weights"),
    [(api.export_transformers, interop.WEIGHTS), (api.export_bin, "pytorch_model.bin")],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_transformers_reads_the_folder(
    run: Path, tmp_path: Path, write: Any, weights: str, dtype: str | None
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write(run, tmp_path / "out", dtype=dtype)
    assert {path.name for path in folder.iterdir()} == READ | {weights}
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype is (torch.bfloat16 if dtype else torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the kernel loads").input_ids])
    assert ids[0].tolist() == load_tokenizer(best(run)).encode("the kernel loads")
    ours = interop.load_model(best(run))(ids)
    tolerance = 0.1 if dtype else 1e-5
    torch.testing.assert_close(theirs(ids).logits.float(), ours, atol=tolerance, rtol=0.1)


def test_what_does_not_fit_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="there exists already"):
        api.export_transformers(run, tmp_path / "there")
    with pytest.raises(ConfigError, match="no dtype float15"):
        api.export_transformers(run, tmp_path / "new", dtype="float15")
    checkpoint = checkpoint_of(tmp_path / "there" / "large")
    tensors = interop.read_tensors(checkpoint)
    from safetensors.torch import save_file

    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, checkpoint / interop.WEIGHTS)
    with pytest.raises(DataError, match=r"model\.norm\.weight has values beyond float16"):
        api.export_bin(checkpoint, tmp_path / "new", dtype="float16")
    (checkpoint / interop.WEIGHTS).unlink()
    with pytest.raises(DataError, match=r"has no model\.safetensors"):
        api.export_bin(checkpoint, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(f"{artifacts.TEMPORARY}*"))


def test_an_interrupted_folder_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        api.export_bin(run, tmp_path / "new" / "bin")
    assert list((tmp_path / "new").iterdir()) == []
