from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.helpers_cli import Command
from tests.helpers_evaluation import best, change_config, reseal
from thimble import artifacts, generation
from thimble.errors import ConfigError, DataError
from thimble.evaluation.acceptance import Acceptance, Condition, accept
from thimble.evaluation.perplexity import evaluate_split
from thimble.generation.model import Model
from thimble.tokens.shards import TokenSplit

NAMES = [
    "training record",
    "validation perplexity",
    "checkpoint complete",
    "generated text",
    "size on disk",
]


def condition(result: Acceptance, name: str) -> Condition:
    (found,) = [c for c in result.conditions if c.name == name]
    return found


def failed(result: Acceptance) -> list[str]:
    assert not result.accepted
    return [c.name for c in result.conditions if not c.ok]


def add_records(run: Path, *records: dict[str, Any]) -> None:
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_a_sound_run_is_accepted_and_says_so(run: Path, tokens: Path) -> None:
    result = accept(run)
    assert result.accepted
    assert [c.name for c in result.conditions] == NAMES
    assert all(c.ok is True for c in result.conditions)
    written = json.loads((run / "acceptance.json").read_text())
    assert written == result.to_dict()
    assert written["accepted"] is True
    assert result.checkpoint == best(run)

    # The whole split, though the run's own evaluations read 300 tokens at most.
    split = TokenSplit(tokens, "val")
    assert result.evaluation["tokens"] == len(split)
    model = generation.load(run)
    again = evaluate_split(model.nll, split, 16, 3)
    assert result.evaluation["perplexity"] == pytest.approx(again["perplexity"], rel=1e-5)
    bits = result.evaluation["bits_per_byte"]
    assert all(rung.passed_by_model == (bits < rung.bits_per_byte) for rung in result.ladder)
    values = [rung.bits_per_byte for rung in result.ladder]
    assert values == sorted(values, reverse=True)
    assert any(rung.passed_by_model for rung in result.ladder)
    # The card is beside the checkpoint's files and breaks none of them.
    manifest = artifacts.read_manifest(best(run), "checkpoint", make="")
    assert not artifacts.damaged_files(best(run), manifest, hashes=True)
    assert (best(run) / "README.md").is_file()
    assert accept(run).evaluation == result.evaluation


def test_checkpoint_folder_and_run_are_the_same_request(run: Path) -> None:
    assert accept(best(run)).to_dict() | {"created": ""} == accept(run).to_dict() | {"created": ""}


def test_the_test_split_can_be_asked_for(run: Path) -> None:
    result = accept(run, split="test")
    assert condition(result, "test perplexity").ok
    assert (Path(result.run) / "acceptance.json").is_file()
    with pytest.raises(ConfigError, match="held-out"):
        accept(run, split="train")


def test_perplexity_above_the_threshold(run: Path) -> None:
    change_config(run, acceptance={"perplexity": 2.0})
    assert failed(accept(run)) == ["validation perplexity"]
    assert not (best(run) / "README.md").exists()
    assert json.loads((run / "acceptance.json").read_text())["accepted"] is False


@pytest.mark.parametrize(
    "record",
    [
        {"step": 3, "loss": math.nan, "learning_rate": 0.1},
        {"step": 3, "val_loss": 900.0, "val_perplexity": math.inf},
        {"event": "guard", "kind": "nan", "step": 70, "reason": "the loss is nan"},
        {"event": "guard", "kind": "explosion", "step": 70, "reason": "the gradient norm"},
    ],
)
def test_nan_in_the_record(run: Path, record: dict[str, Any]) -> None:
    add_records(run, record)
    result = accept(run)
    assert failed(result) == ["training record"]
    assert f"step {record['step']}" in condition(result, "training record").measured


def test_a_stop_that_was_left_behind_does_not_count(run: Path) -> None:
    stop = {"event": "guard", "kind": "nan", "step": 70, "reason": "the loss is nan"}
    later = {"step": 80, "loss": 2.0}
    add_records(run, stop, {"event": "resumed", "step": 60}, later)
    assert accept(run).accepted
    add_records(run, {**stop, "step": 90})  # and again
    assert failed(accept(run)) == ["training record"]


def test_stops_that_are_no_nan_are_named_only(run: Path) -> None:
    add_records(run, {"event": "guard", "kind": "plateau", "step": 60, "reason": "no lower loss"})
    add_records(run, {"step": 60, "loss": 2.0, "grad_norm": math.inf})  # as under float16
    result = accept(run)
    assert result.accepted
    assert "no lower loss" in condition(result, "training record").measured


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: flip(d / "model.safetensors"), "model.safetensors does not have the sha256"),
        (lambda d: (d / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda d: (d / "config.yaml").write_text("a: ["), "config.yaml has 4 bytes"),
    ],
)
def test_damage_is_named_and_nothing_is_loaded(
    run: Path, damage: Callable[[Path], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(best(run))
    monkeypatch.setattr("thimble.evaluation.acceptance.load", None)
    result = accept(run)
    assert failed(result) == NAMES[1:4]
    assert words in condition(result, "checkpoint complete").measured
    assert condition(result, "validation perplexity").ok is None
    assert result.ladder == []
    assert "not measured" in rendered(result)


def test_a_file_the_manifest_does_not_name_is_missing(run: Path) -> None:
    path = best(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["optimizer.pt"]
    path.write_text(json.dumps(manifest))
    assert "optimizer.pt is missing" in condition(accept(run), "checkpoint complete").measured


@pytest.mark.parametrize("text", ["", "the disk " * 40])
def test_degenerate_text(run: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "generate", lambda self, prompt, **options: text)
    result = accept(run)
    assert failed(result) == ["generated text"]
    assert "0 of 8" in condition(result, "generated text").measured


def test_a_few_degenerate_texts_are_let_through(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(empty: int) -> Callable[..., str]:
        left = iter([""] * empty + ["the kernel mounts"] * 8)
        return lambda self, prompt, **options: next(left)

    monkeypatch.setattr(Model, "generate", answer(2))
    assert accept(run).accepted
    monkeypatch.setattr(Model, "generate", answer(3))
    assert failed(accept(run)) == ["generated text"]


def test_a_size_that_the_configuration_does_not_imply(run: Path) -> None:
    change_config(run, model={"num_hidden_layers": 2})
    result = accept(run)
    assert failed(result) == ["size on disk"]
    assert "model.safetensors" in condition(result, "size on disk").measured


def test_samples_are_seeded_and_continue_held_out_documents(run: Path, tokens: Path) -> None:
    first, second = accept(run).samples, accept(run).samples
    assert first == second
    assert len(first) == 8
    assert len({sample.text for sample in first}) > 4
    split = TokenSplit(tokens, "val")
    tokenizer = generation.load(run).tokenizer
    starts = [
        tokenizer.decode(split.tokens[s : s + 30]) for s in split.documents["start"].to_pylist()
    ]
    assert all(any(text.startswith(sample.prompt) for text in starts) for sample in first)


def rendered(result: Acceptance) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    result.render(console)
    return console.export_text()


def test_what_a_person_sees(run: Path) -> None:
    result = accept(run)
    text = rendered(result)
    assert "accepted" in text
    assert all(name in text for name in NAMES)
    lines = text.splitlines()
    bars = {rung.name: next(x for x in lines if x.startswith(rung.name)) for rung in result.ladder}
    lengths = [bars[rung.name].count("▒") for rung in result.ladder]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 3
    assert any("this model" in line and "█" in line for line in lines)
    ahead = [rung.name for rung in result.ladder if not rung.passed_by_model]
    assert all(name in text.split("Not reached:")[1] for name in ahead)


def test_the_command_prints_one_object_and_its_status_says(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = Command(capfd)
    answer = command("accept", str(run), "--json", "-q")
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["accepted"] is True
    change_config(run, acceptance={"perplexity": 2.0})
    assert command("accept", str(run), "-q").status == 3


def no_record(run: Path, tokens: Path) -> None:
    (run / "metrics.jsonl").unlink()


def broken_record(run: Path, tokens: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step"\n{"step": 2}\n')


def no_tokens(run: Path, tokens: Path) -> None:
    shutil.rmtree(tokens)


def other_tokens(run: Path, tokens: Path) -> None:
    manifest = json.loads((tokens / "manifest.json").read_text())
    manifest["fingerprint"] = "0" * 16
    (tokens / "manifest.json").write_text(json.dumps(manifest))


def other_architecture(run: Path, tokens: Path) -> None:
    path = best(run) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gpt2"}))
    reseal(best(run))


def no_manifest(run: Path, tokens: Path) -> None:
    (best(run) / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_record, r"metrics\.jsonl does not exist"),
        (broken_record, r"line 2 is damaged"),
        (no_tokens, r"There is no tokens at .*\n.*thimble tokens build"),
        (other_tokens, r"is not what .* was trained on"),
        (other_architecture, r"is a gpt2; thimble loads llama, mistral"),
        (no_manifest, r"has no manifest\.json"),
    ],
)
def test_what_cannot_be_judged_is_one_clear_error(
    run: Path, tokens: Path, spoil: Callable[[Path, Path], None], words: str
) -> None:
    spoil(run, tokens)
    with pytest.raises(DataError, match=words):
        accept(run)
    assert not (run / "acceptance.json").exists()
    assert not (best(run) / "README.md").exists()


def test_a_checkpoint_without_its_run_is_refused(run: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(best(run), tmp_path / "alone")
    with pytest.raises(DataError, match="not a checkpoint in a run's folder"):
        accept(alone)
    with pytest.raises(DataError, match="no checkpoint or run"):
        accept(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="run"):
        accept(tmp_path / "empty")


def test_a_recipe_without_a_gate_is_refused(run: Path) -> None:
    change_config(run, acceptance={"perplexity": None})
    with pytest.raises(ConfigError, match=r"no gate(?s:.*)thimble evaluate"):
        accept(run)
