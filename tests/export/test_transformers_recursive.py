"""Exports of recursive models: what transformers can run, and what is refused."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thimble.hub
from tests.helpers_cli import Command
from tests.helpers_recursive import build_puzzles, conversation_checkpoint, puzzle_checkpoint
from thimble import api
from thimble.artifacts import read_json
from thimble.generation.model import load
from thimble.models import interop

HRM_TEXT: dict[str, Any] = {
    "separate_stacks": True,
    "pre_norm": True,
    "attention_gate": True,
    "inject_input": False,
    "halt_max_steps": 1,
    "bp_cycles": 2,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def trm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversation_checkpoint(tmp_path_factory.mktemp("trm"))


@pytest.fixture(scope="module")
def hrm_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversation_checkpoint(tmp_path_factory.mktemp("hrm"), **HRM_TEXT)


@pytest.fixture
def thimble_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_fitting_model_becomes_an_hrm_text(
    hrm_text: Path, tmp_path: Path, dtype: str | None
) -> None:
    folder = api.export_transformers(hrm_text, tmp_path / "out", dtype=dtype)
    assert read_json(folder / "config.json")["model_type"] == "hrm_text"
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "HrmTextForCausalLM"
    ours = interop.load_model(hrm_text)(ids)
    tolerance = 0.1 if dtype else 1e-5
    torch.testing.assert_close(theirs(ids).logits.float(), ours, atol=tolerance, rtol=tolerance)
    # ... and thimble reads it, as it reads the checkpoint
    if dtype is None:
        torch.testing.assert_close(interop.load_model(folder)(ids), ours)


def test_it_runs_where_thimble_is_not_installed(hrm_text: Path, tmp_path: Path) -> None:
    folder = api.export_transformers(hrm_text, tmp_path / "out")
    wanted: list[int] = []
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    model = load(folder, "cpu")
    model.generate("the kernel", watch=lambda token: wanted.append(token.id), **options)
    prompt = [model.layout.begin, *model.tokenizer.encode("the kernel")]
    code = (
        "import sys; sys.modules['thimble'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"ids = torch.tensor([{prompt}])\n"
        "options = {'max_new_tokens': 6, 'do_sample': False, 'eos_token_id': None}\n"
        "out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)\n"
        f"print(out[0, {len(prompt)}:].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert len(wanted) > 2
    assert json.loads(done.stdout)[: len(wanted)] == wanted


@torch.no_grad()
def test_another_one_stays_what_it_is(
    trm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "thimble"):
        folder = api.export_transformers(trm, tmp_path / "out")
    assert "import thimble.hub" in caplog.text
    assert "model.separate_stacks is False, not True" in caplog.text
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json"}
    assert not (folder / "optimizer.pt").exists()
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(theirs, thimble.hub.ThimbleRecursiveForCausalLM)
    ids = AutoTokenizer.from_pretrained(folder)("the kernel loads", return_tensors="pt").input_ids
    assert torch.equal(theirs(ids).logits, interop.load_model(trm)(ids))
    shorter = api.export_transformers(trm, tmp_path / "short", dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(shorter)
    assert half.dtype is torch.bfloat16
    assert interop.read_config(shorter) == interop.read_config(trm)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["export", "gguf"], "llama.cpp runs a stack once"),
        (["export", "onnx"], "runs a stack once"),
        (["quantize"], "runs a stack once"),
    ],
)
def test_what_runs_a_stack_once_refuses(
    command: list[str], what: str, trm: Path, tmp_path: Path, thimble_command: Command
) -> None:
    before = sorted(trm.parent.rglob("*"))
    target = str(tmp_path / "out")
    answer = thimble_command(*command, str(trm), "--output", target)
    assert answer.status == 2
    assert what in answer.err
    assert f"thimble export transformers -o FOLDER {trm}" in answer.err.replace("\n", "")
    assert sorted(trm.parent.rglob("*")) == before
    assert not Path(target).exists()


@pytest.mark.parametrize("command", [["export", "transformers"], ["export", "gguf"]])
def test_puzzles_stay_here(command: list[str], tmp_path: Path, thimble_command: Command) -> None:
    puzzles = puzzle_checkpoint(tmp_path, build_puzzles(tmp_path / "puzzles"))
    answer = thimble_command(*command, str(puzzles), "--output", str(tmp_path / "out"))
    assert answer.status == 2
    assert "thimble evaluate" in answer.err
    assert not (tmp_path / "out").exists()
