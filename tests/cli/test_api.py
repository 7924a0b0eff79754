"""The whole way on real, very small data: corpus folder, tokens, run, checkpoint, text."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

import thimble
from tests.helpers_cli import SMALL, Command, make_corpus
from thimble import api, api_data
from thimble.artifacts import sha256_file
from thimble.config.load import load, load_run
from thimble.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a corpus, its tokens and one run of four steps have been made."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_corpus(Path("data/corpus/made-quick"))
        tokens = thimble.build_tokens("made", vocab_size=300)
        thimble.train("slm_nano", *SMALL, f"data.path={tokens}", training={"max_steps": 4})
    return folder


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return min(Path("runs/slm_nano").iterdir())


@pytest.fixture
def thimble_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def test_a_run_holds_the_configuration_it_was_made_with(run: Path) -> None:
    words = [*SMALL, "data.path=data/tokens/made-quick-300", "training.max_steps=4"]
    assert load_run(run) == load("slm_nano", words)


def test_a_saved_configuration_plans_the_same_run(run: Path) -> None:
    words = [*SMALL, "data.path=data/tokens/made-quick-300", "training.max_steps=4"]
    saved = thimble.plan(run / "config.yaml", measure=False)
    typed = thimble.plan("slm_nano", *words, measure=False)
    assert (saved.plan, saved.memory) == (typed.plan, typed.memory)
    assert saved.plan.steps == 4


def test_training_goes_on_where_it_was_by_path_and_by_itself(
    run: Path, thimble_command: Command
) -> None:
    answer = thimble_command("--json", "train", "--resume", str(run), "--max-steps", "6")
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["step"] == 6
    assert json.loads(answer.out)["run"] == str(run)
    answer = thimble_command("--json", "train", "slm_nano", "--resume", "--max-steps", "8")
    assert json.loads(answer.out)["step"] == 8
    assert json.loads(answer.out)["run"] == str(run)
    assert len(list(run.parent.iterdir())) == 1
    assert load_run(run).training.max_steps == 4


def test_a_run_is_not_resumed_as_another_recipe(run: Path) -> None:
    with pytest.raises(ConfigError, match=f"thimble train slm_nano --resume {run}"):
        thimble.train("slm_tiny", resume=run)
    with pytest.raises(DataError, match="no run of slm_tiny"):
        thimble.train("slm_tiny", resume="auto")
    with pytest.raises(DataError, match="not a run"):
        thimble.train(resume="data")
    with pytest.raises(ConfigError, match="Which recipe"):
        thimble.train(resume="auto")


def test_what_the_plan_warns_of_is_said_before_training(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def instead(*_: object) -> SimpleNamespace:
        seen.extend(caplog.messages)
        return SimpleNamespace(path=run, status="finished")

    monkeypatch.setattr("thimble.training.train_with_retries", instead)
    monkeypatch.setattr(logging.getLogger("thimble"), "propagate", True)
    thimble.train(run, "optim.warmup_steps=4000")
    assert any("optim.warmup_steps=" in message for message in seen)


def test_missing_tokens_are_refused_before_a_run_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thimble_command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = thimble_command("train", "slm_nano")
    assert answer.status == 5
    assert "data/tokens/os_kernel-quick-4096" in answer.err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_speaks_by_prompt_message_and_chat(
    run: Path, thimble_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--max-tokens", "8", "--device", "cpu")
    streamed = thimble_command("generate", str(run), "--prompt", "the kernel", *words)
    assert streamed.status == 0, streamed.err
    at_once = thimble_command("generate", str(run), "--prompt", "the kernel", *words, "--json")
    assert streamed.out == json.loads(at_once.out)["text"] + "\n"
    answer = thimble_command("generate", str(run), "--message", "hello?", *words, "--json")
    assert answer.status == 0
    lines = iter(["one?", "two?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    messages = json.loads(thimble_command("chat", str(run), *words, "--json").out)["messages"]
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "two?"


def test_load_gives_the_model_of_the_best_checkpoint(run: Path) -> None:
    model = thimble.load(run, device="cpu")
    assert model.generate("the", max_tokens=4, seed=3) == api.generate(
        run, prompt="the", max_tokens=4, seed=3, device="cpu"
    )


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("data/corpus/made-quick", "corpus"),
        ("data/tokens/made-quick-300", "tokens"),
        ("data/tokens/made-quick-300/manifest.json", "tokens"),
        ("{run}/checkpoints/step-000004", "checkpoint"),
        ("{run}", "run"),
    ],
)
def test_inspect_knows_every_artefact(
    run: Path, thimble_command: Command, path: str, kind: str
) -> None:
    path = path.format(run=run)
    said = json.loads(thimble_command("inspect", path, "--json").out)
    assert said["kind"] == kind
    assert said.get("state", "complete").startswith("complete")
    answer = thimble_command("inspect", path)
    assert answer.status == 0
    assert kind in answer.out


def test_inspect_of_a_run_says_how_far_it_came(run: Path) -> None:
    said = api.inspect(run)
    assert said["parameters"] == load_run(run).model.num_parameters
    assert said["last evaluation"]["val_perplexity"] > 1
    assert said["best"] in said["checkpoints"]


def test_inspect_names_a_damaged_file(run: Path, tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "corpus", documents=20)
    file = folder / "documents-00000.parquet"
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    said = api.inspect(folder)
    assert said["state"] == "damaged"
    assert said["damage"] == ["documents-00000.parquet does not have the sha256 of the manifest"]


@pytest.mark.parametrize("content", [None, "[]", "{}", "{"])
def test_inspect_refuses_what_is_not_ours(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError):
        api.inspect(tmp_path)
    with pytest.raises(DataError, match="nothing at"):
        api.inspect(tmp_path / "missing")


def test_a_corpus_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path("data/corpus")
    with pytest.raises(DataError, match="thimble corpus build os_kernel"):
        api_data.find_corpus("os_kernel")
    (home / "os_kernels-quick").mkdir(parents=True)
    (home / "os_kernel-quick").mkdir()
    assert api_data.find_corpus("os_kernel") == home / "os_kernel-quick"
    (home / "os_kernel-full").mkdir()
    with pytest.raises(ConfigError, match="thimble tokens build data/corpus/os_kernel-full"):
        api_data.find_corpus("os_kernel")
    assert api_data.find_corpus("os_kernel-full") == home / "os_kernel-full"
    assert api_data.find_corpus(home / "os_kernel-full") == home / "os_kernel-full"
    assert api_data.find_corpus("elsewhere/x") == Path("elsewhere/x")


def test_a_barely_trained_model_is_not_accepted_and_the_status_says(
    run: Path, thimble_command: Command
) -> None:
    # Words of a made language are soon learned; the first checkpoint has hardly seen them.
    first = min((run / "checkpoints").glob("step-*"))
    answer = thimble_command("accept", str(first), "--device", "cpu", "--json")
    assert answer.status == 3, answer.err
    said = json.loads(answer.out)
    assert said["accepted"] is False
    assert [row["ok"] for row in said["conditions"] if "perplexity" in row["name"]] == [False]
    passing = thimble.accept(first, device="cpu").to_dict()["conditions"]
    assert [row["name"] for row in passing] == [row["name"] for row in said["conditions"]]


def test_files_of_ones_own_become_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thimble_command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    sentences = [f"Driver number {i} handles the device with id {i * i:05d}." for i in range(900)]
    Path("mine.txt").write_text("\n".join(sentences))
    answer = thimble_command("corpus", "build", "--from", "mine.txt", "--json", "--workers", "1")
    assert answer.status == 0, answer.err
    assert json.loads(answer.out) == {"path": "data/corpus/mine"}
    assert api.inspect("data/corpus/mine")["counts"]["documents"] > 0
    answer = thimble_command("corpus", "build", "--from", "missing.txt", "--json")
    assert answer.status == json.loads(answer.out)["status"] != 0


def test_an_exported_file_and_a_sweep_are_described(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    facts = {"name": file.name, "bytes": 7, "sha256": sha256_file(file)}
    described = {"kind": "deployment", "type": "F16", "file": facts}
    (tmp_path / "model.gguf.json").write_text(json.dumps(described))
    said = api.inspect(file)
    assert said["kind"] == "exported model, F16"
    assert said["state"].startswith("complete")
    file.write_bytes(b"other weights")
    assert api.inspect(file)["state"].startswith("damaged")
    (tmp_path / "model.gguf.json").write_text("{}")
    with pytest.raises(DataError, match="no manifest of ours"):
        api.inspect(file)
    (tmp_path / "sweep.json").write_text(json.dumps({"kind": "sweep", "runs": []}))
    assert api.inspect(tmp_path)["kind"] == "sweep"
