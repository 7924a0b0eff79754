"""Fine-tuning: the right labels, the same course after a resume, nothing but the change trained."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.teachers.helpers import LENGTH, examples, logits_of, make_teacher
from thimble import inspection
from thimble.errors import ConfigError, DataError, GuardStop, Interrupted
from thimble.teachers import Asked, finetune, models
from thimble.teachers.direct import open_direct
from thimble.teachers.finetune import Finetuned, Options, Run

pytest.importorskip("peft")
CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {
    "rank": 4,
    "learning_rate": 0.02,
    "max_steps": 8,
    "batch_rows": 4,
    "micro_batch_rows": 2,
    "warmup_steps": 2,
    "eval_every": 4,
    "eval_rows": 6,
    "save_every": 3,
    "log_every": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"), initializer_range=0.05)


def tune(folder: Path, output: Path, **changes: Any) -> Finetuned:
    run = {key: changes.pop(key) for key in ("resume", "ram_disk") if key in changes}
    return finetune.finetune(
        folder,
        changes.pop("train", examples()),
        examples("val"),
        output,
        Options(**OPTIONS | changes),
        device=CPU,
        precision="float32",
        **run,
    )


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finetuned]:
    output = tmp_path_factory.mktemp("tuned") / "out"
    return output, tune(folder, output)


def test_labels_are_shifted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is transformers' own, which shifts by itself, of the row with the token after it."""
    losses = []

    def first_step(self: Run) -> Any:
        self.adapted.eval()
        rows = self.rows.rows([0, 1])
        losses.append(float(self.loss(rows).detach()) / rows.targets.size)
        whole = torch.from_numpy(np.concatenate([rows.inputs, rows.targets[:, -1:]], axis=1))
        reference = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            losses.append(float(reference(input_ids=whole, labels=whole).loss))
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train", first_step)
    with pytest.raises(KeyboardInterrupt):
        tune(folder, folder / "unused")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_perplexity_falls_and_is_that_of_the_merged_model(
    folder: Path, tuned: tuple[Path, Finetuned]
) -> None:
    output, result = tuned
    assert result.perplexity < 0.7 * result.base_perplexity
    rows = examples("val")
    chosen = np.linspace(0, rows.count - 1, 6).round().astype(int)
    inputs, targets, _ = rows.rows(chosen)
    for model, expected in (
        (folder, result.base_perplexity),
        (output / "merged", result.perplexity),
    ):
        logits = logits_of(model, inputs)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(targets).flatten()
        )
        assert math.exp(float(loss)) == pytest.approx(expected, rel=1e-4)
    said = json.loads((output / "finetune.json").read_text())
    assert said["improvement"] == pytest.approx(1 - result.perplexity / result.base_perplexity)
    assert list(said["loss_by_step"]) == ["2", "4", "6", "8"]
    for name in ("adapter", "merged"):
        assert inspection.inspect(output / name)["state"].startswith("complete")


def test_adapter_and_merged_are_the_same_teacher(
    folder: Path, tuned: tuple[Path, Finetuned]
) -> None:
    output, _ = tuned
    inputs = torch.from_numpy(examples().rows([3]).inputs)
    one = open_direct(output / "merged", examples(), Asked(8), device=CPU, precision="float32")
    other = open_direct(
        folder, examples(), Asked(8), adapter=output / "adapter", device=CPU, precision="float32"
    )
    assert torch.equal(one.targets([3], inputs).log_probs, other.targets([3], inputs).log_probs)
    assert not list((output / "adapter").glob("*.bin"))


def test_every_map_but_the_head_is_changed_and_nothing_else(
    folder: Path, tuned: tuple[Path, Finetuned]
) -> None:
    output, result = tuned
    before, after = (load_file(f / "model.safetensors") for f in (folder, output / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if "proj" in name}
    assert changed == linear
    assert before.keys() == after.keys()
    per_layer = sum(4 * sum(before[n].shape) for n in linear)
    assert result.trained_parameters == per_layer


def test_a_resumed_run_is_the_uninterrupted_one(
    folder: Path, tmp_path: Path, tuned: tuple[Path, Finetuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = tuned
    step = Run.step

    def interrupted(self: Run) -> None:
        step(self)
        if self.state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "step", interrupted)
    with pytest.raises(Interrupted, match="after step 5"):
        tune(folder, tmp_path / "out")
    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(ConfigError, match="--resume"):
        tune(folder, tmp_path / "out")
    result = tune(folder, tmp_path / "out", resume="auto")
    assert (result.perplexity, result.steps) == (expected.perplexity, expected.steps)
    mine, theirs = (
        load_file(o / "adapter" / "adapter_model.safetensors") for o in (tmp_path / "out", whole)
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    kept = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-000006", "step-000008"]

    # A checkpoint by name; a damaged one; one of another teacher, data or rank.
    first = tmp_path / "out" / "checkpoints" / "step-000006"
    assert tune(folder, tmp_path / "out", resume=first).perplexity == expected.perplexity
    assert tune(folder, tmp_path / "out", resume=first, max_steps=2).steps == 6
    # From an older one on: what is written stays, beside the two that are further.
    tune(folder, tmp_path / "older", max_steps=3)
    older = tmp_path / "older" / "checkpoints" / "step-000003"
    tune(folder, tmp_path / "out", resume=older, max_steps=5)
    assert (tmp_path / "out" / "checkpoints" / "step-000005").is_dir()
    with pytest.raises(DataError, match=r"its eval_rows differ"):
        tune(folder, tmp_path / "out", resume=first, eval_rows=1)
    with pytest.raises(DataError, match=r"another fine-tuning: its rank differ"):
        tune(folder, tmp_path / "out", resume=first, rank=8)
    with pytest.raises(DataError, match=r"its train differ"):
        tune(folder, tmp_path / "out", resume=first, train=examples("test"))
    with pytest.raises(DataError, match=r"its teacher differ"):
        tune(make_teacher(tmp_path / "b", seed=2), tmp_path / "out", resume=first)
    (first / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"optimizer\.pt"):
        tune(folder, tmp_path / "out", resume=first)


def test_a_loss_that_is_no_number_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Run.loss

    def broken(self: Run, rows: Any) -> Any:
        found = loss(self, rows)
        return found * math.nan if self.state.step == 4 and self.adapted.training else found

    monkeypatch.setattr(Run, "loss", broken)
    with pytest.raises(GuardStop, match=r"Step 5: the loss is nan(.|\n)*--learning-rate"):
        tune(folder, tmp_path / "out")
    saved = tmp_path / "out" / "checkpoints" / "step-000003"
    assert inspection.inspect(saved)["state"].startswith("complete")
    assert not (tmp_path / "out" / "adapter").exists()
    monkeypatch.setattr(Run, "loss", loss)
    assert tune(folder, tmp_path / "out", resume="auto", learning_rate=0.01).steps == 8


def test_checkpointed_activations_and_weights_from_memory_change_nothing(
    folder: Path, tmp_path: Path, tuned: tuple[Path, Finetuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "shm"
    disk.mkdir()
    monkeypatch.setattr(models, "RAM_DISK", disk)
    result = tune(folder, tmp_path / "out", checkpoint_activations=True, ram_disk=True)
    assert result.perplexity == pytest.approx(tuned[1].perplexity, rel=1e-5)
    assert not list(disk.iterdir())
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder)


def test_every_row_once_an_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def collect(self: Run) -> Any:
        assert self.total == math.ceil(examples().count / 4)
        for step in range(2 * examples().count // 4 + 1):
            seen.extend(self.order(step).tolist())
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train", collect)
    with pytest.raises(KeyboardInterrupt):
        tune(folder, folder / "unused2", max_steps=None)
    count = examples().count
    assert sorted(seen[:count]) == sorted(seen[count : 2 * count]) == list(range(count))
    assert seen[:count] != seen[count : 2 * count]
    assert examples().length == LENGTH


def test_a_teacher_of_another_vocabulary_is_not_tuned(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "a")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        tune(folder, tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"learning_rate": 0.0}, {"max_steps": 0}])
def test_what_cannot_be_trained_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Options(**wrong)
