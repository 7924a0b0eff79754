"""The documents' commands, as they stand there, mean what they mean there."""

from __future__ import annotations

import pytest

from thimble.config.documents import translate
from thimble.config.load import load
from thimble.errors import ConfigError


def test_the_epoch_of_the_playbook() -> None:
    config = load(
        "instruct_slimorca",
        [
            "dataset.data_dir=data/slimorca_full",
            "dataset.subset_size=null",
            "dataloader_workers=0",
            "global_batch_size=48",
            "epochs=1",
        ],
    )
    assert config.dataset.data_dir == "data/slimorca_full"
    assert config.dataset.subset_size is None
    assert config.dataset.dataloader_workers == 0
    assert config.training.max_epochs == 1
    training = config.training
    assert training.micro_batch_size * training.gradient_accumulation_steps == 48


def test_the_defaults_are_the_documents() -> None:
    config = load("instruct_slimorca")
    optim = config.optim
    assert (optim.learning_rate, optim.min_lr_ratio, optim.warmup_steps) == (1e-4, 0.1, 100)
    assert (optim.weight_decay, optim.betas, optim.ema_rate) == (0.1, [0.9, 0.95], None)
    assert config.training.max_epochs == 1
    assert config.training.micro_batch_size * config.training.gradient_accumulation_steps == 32
    assert (config.dataset.seq_len, config.dataset.test_ratio) == (512, 0.05)
    model = config.model
    assert (model.H_cycles, model.L_cycles, model.num_hidden_layers) == (3, 6, 2)
    assert (model.halt_max_steps, model.vocab_size) == (16, 32000)
    assert model.num_parameters == 39_584_770


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["arch.L_cycles=4", "arch.H_cycles=8"], ["model.L_cycles=4", "model.H_cycles=8"]),
        (["arch.mlp_t=True"], ["model.mixer=mlp"]),
        (["ema=True"], ["optim.ema_rate=0.999"]),
        (["ema=true", "ema_rate=0.99"], ["optim.ema_rate=0.99"]),
        (["ema=False"], ["optim.ema_rate=null"]),
        (["lr=1e-4", "lr_min_ratio=1"], ["optim.learning_rate=1e-4", "optim.min_lr_ratio=1"]),
        (["arch.loss.loss_type=stablemax_cross_entropy"], ["objective.form=stablemax"]),
        (["load_checkpoint=runs/x"], ["training.load_checkpoint=runs/x"]),
        (["freeze_weights=True"], ["optim.freeze_weights=True"]),
        (["arch.pos_encodings=learned"], ["model.position_embedding=learned"]),
        (["arch.no_ACT_continue=False"], ["model.q_continue=true"]),
        (["arch.no_ACT_continue=True"], ["model.q_continue=false"]),
        (["optim.betas=[0.9,0.99]"], ["optim.betas=[0.9,0.99]"]),
        (
            ["global_batch_size=48", "training.micro_batch_size=12"],
            ["training.gradient_accumulation_steps=4", "training.micro_batch_size=12"],
        ),
    ],
)  # fmt: skip
def test_each_name(theirs: list[str], ours: list[str]) -> None:
    assert list(translate(theirs)) == ours


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch_size=48"):
        list(translate(["global_batch_size=50", "training.micro_batch_size=12"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.causal=false"], "model.causal=true"),
        (["model.mixer=mlp", "model.causal=false"], "model.causal=true"),
        (["model.mixer=mlp"], "model.mixer=attention"),
        (["dataset.name=null"], "data.path="),
        (["objective.name=next_token"], "objective.name=act"),
        (["training.sequence_length=100"], "training.sequence_length=512"),
    ],
)
def test_what_no_language_recipe_can_be(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("instruct_slimorca", overrides)
