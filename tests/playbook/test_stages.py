"""The documents' schedule in small, by their own words: SlimOrca, then OpenOrca."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import helpers_playbook as playbook
from tests.helpers_cli import Command
from thimble import api
from thimble.artifacts import read_json
from thimble.config.load import load
from thimble.evaluation.evaluate_recursive import RecursiveEvaluation
from thimble.training import Run

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_instruct_smoke.sh"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with both data sets and the tokenizer where the documents have them."""
    monkeypatch.chdir(tmp_path)
    playbook.write_slimorca(tmp_path / "data/slimorca_full")
    playbook.write_openorca(tmp_path / "data/openorca")
    path = playbook.write_tokenizer(tmp_path / "tokenizers/llama-32k/tokenizer.model")
    monkeypatch.setenv("LLAMA_TOKENIZER", str(path))
    monkeypatch.setenv("DISABLE_COMPILE", "1")
    return tmp_path


def weights(run: Run) -> dict:
    assert run.latest is not None
    return load_file(run.latest / "model.safetensors")


def test_slimorca_then_openorca_from_its_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*playbook.SMALL, "global_batch_size=8", "epochs=1"]
    first = api.train("instruct_slimorca", *words, "dataset.data_dir=data/slimorca_full", "lr=0.01")
    assert first.status == "finished"
    rate = "lr=1e-8"  # so small that the weights stay what they were at the beginning
    second = api.train("instruct_openorca", *words, rate, f"load_checkpoint={first.path}")
    alone = api.train("instruct_openorca", *words, rate)
    begun, continued, anew = weights(first), weights(second), weights(alone)
    for name, tensor in begun.items():
        assert (continued[name] - tensor).abs().max() < 1e-5, name
    assert any((anew[name] - tensor).abs().max() > 1e-2 for name, tensor in begun.items())
    # Every example of each stage was shown once: all that are not held out.
    for run, count in ((first, 64), (second, 64)):
        assert run.latest is not None
        cursor = read_json(run.latest / "data_cursor.json")
        assert cursor["place"] == cursor["examples_per_epoch"]
        assert 0.8 * count <= cursor["place"] < count
    # Both form an OpenOrca row's four columns and a SlimOrca record's turns into the same layout.
    texts = []
    for run in (first, second):
        config = load(run.path)
        from thimble.conversations.dataset import Conversations

        data = Conversations(config.data.folder)
        ids, labels = data.example(0)
        text = data.tokenizer().decode(ids[: int(data.examples["prompt"][0])].tolist())
        assert "[SYSTEM]" in text
        assert text.index("[USER]") < text.index("[ASSISTANT]")
        assert labels.any()
        texts.append(text)
    assert texts[0] != texts[1]
    found = api.evaluate(second.path, split="test", save_outputs=["preds"])
    assert isinstance(found, RecursiveEvaluation)
    assert api.generate(second.path, message="Say mount 3", max_tokens=4) is not None
    # Another shape cannot begin with those weights.
    with pytest.raises(api.DataError, match="another model"):
        api.train("instruct_openorca", *words, f"load_checkpoint={first.path}", "arch.L_cycles=2")


def smoke(place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *words],
        cwd=place,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_smoke_script(place: Path) -> None:
    done = smoke(place, *playbook.SMALL, SMOKE_SUBSET_SIZE="40", SMOKE_GLOBAL_BATCH="16")
    assert done.returncode == 0, done.stderr
    (run,) = (place / "runs/instruct_slimorca").iterdir()
    config = load(run)
    assert config.dataset.subset_size == 40
    assert config.dataset.test_ratio == 0.05
    assert config.dataset.seq_len == 64  # the word after the script wins over SMOKE_SEQ_LEN
    assert config.training.micro_batch_size == 16
    assert config.training.max_epochs == 1
    assert config.training.compile == "off"
    assert list((run / "checkpoints").glob("step-*/model.safetensors"))


def test_the_smoke_script_without_a_tokenizer(tmp_path: Path) -> None:
    environment = {"LLAMA_TOKENIZER": "", "SMOKE_SUBSET_SIZE": "8"}
    done = smoke(tmp_path, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "tokenizers/llama-32k/tokenizer.model" in done.stderr
    assert "LLAMA_TOKENIZER=" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_smoke_script_asks_for_what_the_documents_say() -> None:
    text = SCRIPT.read_text()
    for name, value in {
        "LLAMA_TOKENIZER": "tokenizers/llama-32k/tokenizer.model",
        "DISABLE_COMPILE": "1",
        "SMOKE_DATA_DIR": "data/slimorca_full",
        "SMOKE_SUBSET_SIZE": "64",
        "SMOKE_SEQ_LEN": "512",
        "SMOKE_TEST_RATIO": "0.05",
        "SMOKE_GLOBAL_BATCH": "32",
        "SMOKE_EPOCHS": "1",
    }.items():
        assert f"${{{name}:-{value}}}" in text


def test_a_plan_of_both_stages_needs_none_of_their_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAMA_TOKENIZER", raising=False)
    words = [*playbook.SMALL, "global_batch_size=48"]
    found = api.plan("instruct_slimorca", "instruct_openorca", *words, measure=False)
    plans = [stage.plan for stage in found.stages]
    assert [plan.recipe for plan in plans] == ["instruct_slimorca", "instruct_openorca"]
    # SlimOrca's 517,982 and OpenOrca's 4.2 million, less what is held out.
    assert [plan.examples for plan in plans] == [486_903, 3_948_000]
    assert found.sum["examples"] == 486_903 + 3_948_000
    for stage in found.stages:
        plan = stage.plan
        assert plan.tokens == plan.examples * 64 * 2  # seq_len, and two supervision steps at most
        assert plan.halting_at_once == 0.5
        assert any("its documents speak of" in line for line in stage.warnings)
        low, high = stage.gpus[1]["hours"]
        table = 0.45 / 0.10 * 2  # of utilization, and of supervision steps
        assert high / low == pytest.approx(table)
    for index, gpu in enumerate(found.sum["gpus"]):
        ends = zip(*(stage.gpus[index]["hours"] for stage in found.stages), strict=True)
        assert gpu["hours"] == pytest.approx([sum(end) for end in ends])
    answer = Command(capfd)(
        "plan", "instruct_slimorca", "instruct_openorca", *words, "--no-measure"
    )
    assert answer.status == 0, answer.err
    assert "the weights of" in answer.out
    assert "486,903 x 1" in answer.out
    assert "its documents speak of" in answer.err
    assert not (tmp_path / "data").exists()


def test_a_plan_measures_conversations_that_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*playbook.SMALL, "global_batch_size=16"]
    found = api.plan("instruct_slimorca", "instruct_openorca", *words)
    first, second = found.stages
    assert "problem" not in first.here
    assert first.here["tokens_per_second"] == second.here["tokens_per_second"]  # measured once
    assert first.here["hours_halting_at_once"] == pytest.approx(first.here["hours"] / 2)
    assert found.sum["here"][1] == pytest.approx(first.here["hours"] + second.here["hours"])


def test_a_plan_of_data_that_are_here_counts_them(place: Path) -> None:
    words = [*playbook.SMALL, "global_batch_size=8", "dataset.data_dir=data/slimorca_full"]
    found = api.plan("instruct_slimorca", *words, measure=False)
    assert 51 <= found.plan.examples < 64
    assert found.plan.tokens_available < found.plan.examples * 64
    assert not any("documents" in line for line in found.warnings)
