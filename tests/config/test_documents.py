"""The documents' commands, as they stand there, mean what they mean there."""

from __future__ import annotations

from pathlib import Path

import pytest

from thimble.config.documents import recipe_of, translate
from thimble.config.load import load
from thimble.errors import ConfigError
from thimble.words import recipe_and_words


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
        (["+ema=true", "+ema_rate=0.99"], ["optim.ema_rate=0.99"]),
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
        # Several values, as of a sweep: each is translated.
        (["model_variant=350M,500m"], ["model=retnet_350m,retnet_500m"]),
        (["teacher_mode=direct,network"], ["teacher.mode=direct,served"]),
        (["reverse_kl=true,false"], ["objective.divergence=reverse,forward"]),
        (["ema=true,false"], ["optim.ema_rate=0.999,null"]),
        (
            ["arch.loss.loss_type=softmax_cross_entropy,stablemax_cross_entropy"],
            ["objective.form=softmax,stablemax"],
        ),
        (
            ["global_batch_size=24,48"],
            ["training.micro_batch_size=24,48", "training.gradient_accumulation_steps=1"],
        ),
        (
            ["global_batch_size=24,48", "training.micro_batch_size=12"],
            ["training.gradient_accumulation_steps=2,4", "training.micro_batch_size=12"],
        ),
        (["+optim.betas=[0.9,0.9],[0.9,0.99]"], ["+optim.betas=[0.9,0.9],[0.9,0.99]"]),
        (["lr=1e-3,1e-4", "seed=1,1"], ["optim.learning_rate=1e-3,1e-4", "seed=1,1"]),
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


def test_the_lines_of_the_quickstart() -> None:
    words = "--weight-decay 0.01 --enable-saddle-interventions --learning-rate=0.001"
    config = load("distill_direct", words.split())
    assert (config.optim.weight_decay, config.optim.learning_rate) == (0.01, 0.001)
    assert config.saddle.interventions
    config = load("distill_direct", ["--pretrain-ce-only", "--max-steps", "10000"])
    assert (config.objective.name, config.training.max_steps) == ("next_token", 10000)
    words = ["--max-steps", "10", "--log-interval", "1", "--eval-interval", "0"]
    config = load("distill_direct", words)
    training = config.training
    assert (training.max_steps, training.log_every, training.eval_every) == (10, 1, 0)


def test_the_configuration_of_the_quickstart() -> None:
    config = load(
        "distill_direct",
        [
            *("train_data_path=data/x", "val_data_path=data/y", "max_seq_length=1024"),
            *("teacher_model=runs/teachers/t/merged", "teacher_adapter_path=a", "teacher_topk=128"),
            *("cache_logits=true", "cache_dir=data/c", "distill_alpha=0.3", "reverse_kl=true"),
            *("teacher_temperature=1.5", "model_variant=350M", "optimizer_type=adamw"),
        ],
    )
    assert (config.data.path, config.data.val_path) == ("data/x", "data/y")
    assert config.training.sequence_length == 1024
    teacher, objective = config.teacher, config.objective
    assert (teacher.path, teacher.adapter, teacher.topk) == ("runs/teachers/t/merged", "a", 128)
    assert (teacher.cache_logits, teacher.cache) == (True, "data/c")
    assert (objective.distill_alpha, objective.temperature) == (0.3, 1.5)
    assert objective.divergence == "reverse"
    assert config.model == load("distill_direct", ["model=retnet_350m"]).model
    assert config.optim.name == "adamw"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_workers=0"], "memory map.* Leave it out"),
        (["use_pretokenized_data=true"], "manifest.json.* Leave it out"),
        (["cache_logits=perhaps"], "must be true or false"),
        (["--teacher-mode"], "teacher_mode=VALUE"),
        (["--techer-topk", "8"], "teacher_topk=8"),
    ],
)
def test_what_has_no_place_is_said(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("distill_direct", words)


def test_their_configuration_is_a_recipe_of_ours(tmp_path: Path) -> None:
    words = ["--weight-decay", "0.01"]
    theirs = ["--config", "configs/train_direct.yaml"]
    assert recipe_and_words(theirs[0], [theirs[1], *words], resumed=False) == (
        "distill_direct",
        words,
    )
    assert recipe_and_words("seed=2", [*theirs, *words], resumed=False) == (
        "distill_direct",
        ["seed=2", *words],
    )
    assert recipe_of([*words, "--config=train_cached.yaml"]) == ("distill_cached", words)
    (tmp_path / "train_direct.yaml").write_text("")
    assert recipe_of(["--config", str(tmp_path / "train_direct.yaml")])[0] == str(
        tmp_path / "train_direct.yaml"
    )
    for wrong in (["--config", "configs/other.yaml"], ["--config"]):
        with pytest.raises(ConfigError, match="thimble train distill_direct"):
            recipe_of(wrong)
    with pytest.raises(ConfigError, match="There are two"):
        recipe_and_words("distill_nano", theirs, resumed=False)
    assert recipe_and_words("lr=1", [], resumed=True) == (None, ["lr=1"])
