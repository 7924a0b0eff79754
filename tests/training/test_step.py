"""One step: the same gradient however it is split, and nothing learned that is not there."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import helpers_training as helpers
from thimble.errors import ConfigError, EnvironmentProblem
from thimble.training import train
from thimble.training.loop import Trainer
from thimble.training.optimizer import schedule


def gradients(trainer: Trainer) -> torch.Tensor:
    """All gradients of one step as one vector, before clipping and the update."""
    kept: list[torch.Tensor] = []
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters, max_norm):  # type: ignore[no-untyped-def]
        parameters = list(parameters)
        kept.append(torch.cat([p.grad.flatten().double() for p in parameters]))
        return clip(parameters, max_norm)

    torch.nn.utils.clip_grad_norm_ = keep  # type: ignore[assignment]
    try:
        trainer.step()
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    return kept[0]


SPLITS = [(32, 1), (8, 4), (1, 32)]


def split(tmp_path: Path, micro: int, accumulation: int) -> Trainer:
    return helpers.trainer(
        helpers.config(
            tmp_path,
            f"training.micro_batch_size={micro}",
            f"training.gradient_accumulation_steps={accumulation}",
        )
    )


@pytest.mark.parametrize("padding", ["none", "unequal"])
def test_any_split_into_micro_batches_gives_the_same_gradient(padding: str, tmp_path: Path) -> None:
    results = []
    for micro, accumulation in SPLITS:
        trainer = split(tmp_path, micro, accumulation)
        if padding == "unequal":
            batch = trainer.task.windows.batch

            def padded(seen: int, size: int, batch=batch):  # type: ignore[no-untyped-def]
                inputs, targets, *others = batch(seen, size)
                targets = targets.copy()  # both are views of the same rows
                for row in range(size):  # from nothing at all to everything
                    targets[row, : row % (helpers.WINDOW + 1)] = -100
                targets[8:16] = -100  # a micro-batch without a single target
                return inputs, targets, *others

            trainer.task.windows.batch = padded  # type: ignore[method-assign]
        results.append(gradients(trainer))
    scale = results[0].norm()
    assert scale > 0
    for other in results[1:]:
        assert (other - results[0]).norm() / scale < 1e-6


def test_a_step_is_the_mean_over_its_targets(tmp_path: Path) -> None:
    trainer = split(tmp_path, 8, 4)
    inputs, targets, *_ = trainer.task.windows.batch(0, 32)
    logits = trainer.model(torch.from_numpy(inputs))
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten()
    )
    loss.backward()
    wanted = torch.cat([p.grad.flatten().double() for p in trainer.model.parameters()])
    trainer.optimizer.zero_grad()
    ours = gradients(split(tmp_path, 8, 4))
    assert (ours - wanted).norm() / wanted.norm() < 1e-5


def test_matrices_decay_and_norms_and_the_embedding_do_not(tmp_path: Path) -> None:
    groups = helpers.trainer(helpers.config(tmp_path)).optimizer.param_groups
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    kept = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert "blocks.0.mlp.down.weight" in decayed
    assert kept == {
        "embedding.weight",
        "norm.weight",
        "blocks.0.mixer_norm.weight",
        "blocks.0.mlp_norm.weight",
    }


def test_schedule(tmp_path: Path) -> None:
    optim = helpers.config(tmp_path, "optim.warmup_steps=10").optim
    rates = [optim.learning_rate * schedule(optim, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[9] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.01)
    assert rates[99] == pytest.approx(0.001)
    assert rates[54] == pytest.approx(0.0055, rel=0.02)  # half-way down the cosine
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_random_labels_do_not_go_below_their_entropy(tmp_path: Path) -> None:
    """Targets that nothing predicts: the loss on fresh ones settles at their entropy, not below."""
    trainer = helpers.trainer(helpers.config(tmp_path, "training.max_steps=300"))
    draw = np.random.default_rng(0)
    choices = 16

    def batch(seen: int, size: int) -> tuple[np.ndarray, ...]:
        shape = (size, helpers.WINDOW)
        inputs, targets = draw.integers(0, 300, shape), draw.integers(0, choices, shape)
        return inputs, targets, np.zeros(shape, dtype=bool), np.arange(size)

    trainer.task.windows.batch = batch  # type: ignore[method-assign]
    losses = []
    for _ in range(200):
        trainer.loss_sum.zero_()
        trainer.step()
        losses.append(trainer.loss_sum.item())
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    settled = float(np.mean(losses[-60:]))
    assert math.log(choices) - 0.02 < settled < math.log(choices) + 0.1


def test_it_learns_what_there_is(tmp_path: Path) -> None:
    run = train(helpers.config(tmp_path, "training.max_steps=60"))
    losses = [record["loss"] for record in run.metrics if "loss" in record]
    assert losses[-1] < 0.7 * losses[0]
    evaluations = [record for record in run.metrics if "val_loss" in record]
    assert evaluations[-1]["val_perplexity"] == pytest.approx(math.exp(evaluations[-1]["val_loss"]))
    assert {path.name for path in (run.path / "samples").iterdir()} >= {"step-000060.txt"}


def test_keeps_the_newest_and_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Trainer.evaluate

    def best_at_eight(self: Trainer) -> bool:
        evaluate(self)
        if self.state.step == 8:
            self.state.best_step, self.state.best_perplexity = 8, 1.0
        return self.state.step == 8

    monkeypatch.setattr(Trainer, "evaluate", best_at_eight)
    run = train(helpers.config(tmp_path, "training.max_steps=28", "training.keep_last=2"))
    names = sorted(path.name for path in (run.path / "checkpoints").glob("step-*"))
    assert names == ["step-000008", "step-000024", "step-000028"]
    assert run.checkpoint is not None
    assert run.checkpoint.name == "step-000008"
    assert run.latest is not None
    assert run.latest.name == "step-000028"


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no device cuda:7 here"):
        train(helpers.config(tmp_path, "device=cuda:7"))
    assert not list(tmp_path.iterdir())


def test_ids_beyond_the_models_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size="):
        train(helpers.config(tmp_path, "model.vocab_size=64"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_and_resumes(precision: str, tmp_path: Path) -> None:
    config = helpers.config(tmp_path, f"precision={precision}", "training.max_steps=8")
    run = train(config)
    losses = [record["loss"] for record in run.metrics if "loss" in record]
    assert losses[-1] < losses[0]
    longer = helpers.config(tmp_path, f"precision={precision}", "training.max_steps=10")
    assert train(longer, resume=run.path).step == 10


def test_ctrl_c_saves_and_leaves_quickly(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests import helpers_training as helpers\n"
        "from thimble.errors import Interrupted\n"
        "from thimble.training import train\n"
        "try:\n    train(helpers.config(Path(sys.argv[1]), 'training.max_steps=100000',\n"
        "        'training.eval_every=100000', 'training.save_every=100000'))\n"
        "except Interrupted as error:\n    print(error); sys.exit(error.status)\n"
    )
    helpers.token_directory()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    metrics = None
    for _ in range(600):
        time.sleep(0.1)
        metrics = next(tmp_path.glob("slm_nano/*/metrics.jsonl"), None)
        if metrics or child.poll() is not None:
            break
    assert metrics is not None
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "--resume" in out
    run = metrics.parent
    assert (run / "checkpoints" / "latest").exists()
