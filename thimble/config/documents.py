"""The keys of other programs as keys of ours, understood as they stand in their documents.

Of the recursive models (TRM, HRM, their SlimOrca fork): ``global_batch_size=48 epochs=1
arch.L_cycles=4``; of the distillation into a RetNet: ``teacher_topk=512 distill_alpha=0.5``, or as
on its command line, ``--learning-rate 0.001 --enable-saddle-interventions``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from thimble.errors import ConfigError

NAMES = {
    "epochs": "training.max_epochs",
    "lr": "optim.learning_rate",
    "lr_min_ratio": "optim.min_lr_ratio",
    "lr_warmup_steps": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "puzzle_emb_lr": "optim.puzzle_emb_lr",
    "puzzle_emb_weight_decay": "optim.puzzle_emb_weight_decay",
    "ema_rate": "optim.ema_rate",
    "load_checkpoint": "training.load_checkpoint",
    "freeze_weights": "optim.freeze_weights",
    "dataloader_workers": "dataset.dataloader_workers",
    "arch.hidden_size": "model.hidden_size",
    "arch.num_heads": "model.num_attention_heads",
    "arch.L_layers": "model.num_hidden_layers",
    "arch.puzzle_emb_len": "model.puzzle_emb_len",
    "arch.pos_encodings": "model.position_embedding",
    "arch.loss.loss_type": "objective.form",
    "learning_rate": "optim.learning_rate",
    "warmup_steps": "optim.warmup_steps",
    "optimizer_type": "optim",
    "max_grad_norm": "optim.grad_clip",
    "max_steps": "training.max_steps",
    "max_seq_length": "training.sequence_length",
    "physical_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "log_interval": "training.log_every",
    "eval_interval": "training.eval_every",
    "save_interval": "training.save_every",
    "keep_last_n": "training.keep_last",
    "train_data_path": "data.path",
    "val_data_path": "data.val_path",
    "teacher_model": "teacher.path",
    "teacher_adapter_path": "teacher.adapter",
    "teacher_url": "teacher.url",
    "teacher_topk": "teacher.topk",
    "teacher_temperature": "objective.temperature",
    "teacher.temperature": "objective.temperature",
    "cache_dir": "teacher.cache",
    "distill_alpha": "objective.distill_alpha",
    "reverse_kl_warmup_steps": "objective.reverse_warmup_steps",
}
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")
# What is true or false there, or an option without a value: our lines for both.
SWITCHES = {
    "arch.mlp_t": ("model.mixer=mlp", "model.mixer=attention"),
    "arch.no_ACT_continue": ("model.q_continue=false", "model.q_continue=true"),
    "enable_saddle_interventions": ("saddle.interventions=true", "saddle.interventions=false"),
    "pretrain_ce_only": ("objective.name=next_token", "objective.name=distill"),
    "cache_logits": ("teacher.cache_logits=true", "teacher.cache_logits=false"),
    "reverse_kl": ("objective.divergence=reverse", "objective.divergence=forward"),
    "gradient_checkpointing": (
        "training.checkpoint_activations=true",
        "training.checkpoint_activations=false",
    ),
    "use_bf16": ("precision=bfloat16", "precision=float32"),
    "enable_wandb": ("logging.wandb=true", "logging.wandb=false"),
}
# What stands in the documents and is nothing that one could set here, with the reason.
NEEDLESS = {
    "num_workers": "chunks are read from a memory map, so no process has to read ahead",
    "use_pretokenized_data": "what is in a folder is said by its manifest.json",
    "tokenizer_name": "the tokenizer is the one in the folder of the data",
}
CONFIGS = {"train_direct": "distill_direct", "train_cached": "distill_cached"}
# The moving average is a number of ours, and a switch of theirs with this number.
EMA_RATE = "0.999"


def translate(overrides: Iterable[str]) -> Iterator[str]:
    """``key=value`` lines with the documents' names as lines with ours; others pass as they are.

    ``global_batch_size=N`` is N examples in one pass, or as many passes as a given
    ``training.micro_batch_size`` makes of it. Of several values, ``key=a,b``, each is translated.
    Raises ConfigError for a batch that does not divide, and for what is not possible here.
    """
    lines = list(overrides)
    given = dict(line.lstrip("+").partition("=")[::2] for line in lines)
    for line in lines:
        name, equals, value = line.partition("=")
        key = name.lstrip("+").strip()
        if not equals:
            yield line
            continue
        if key == "ema_rate" and "ema" in given:
            continue
        ours: dict[str, list[str]] = {}
        for single in value.split(","):
            for word in _ours(name, key, single, given):
                our, _, meant = word.partition("=")
                ours.setdefault(our, []).append(meant)
        for our, values in ours.items():
            beside = len(ours) > 1 and len(set(values)) == 1  # another key has the several values
            yield f"{our}={','.join(values[:1] if beside else values)}"


def _ours(name: str, key: str, value: str, given: dict[str, str]) -> Iterator[str]:
    """Lines of ours for one value; ``name`` is ``key`` as it was written."""
    if key == "global_batch_size":
        yield from _batch(value, given.get("training.micro_batch_size"))
    elif key == "ema":
        rate = given.get("ema_rate", EMA_RATE) if _on(key, value) else "null"
        yield f"optim.ema_rate={rate}"
    elif key in SWITCHES:
        yield SWITCHES[key][0 if _on(key, value) else 1]
    elif key in NEEDLESS:
        raise ConfigError(f"There is no key {key}: {NEEDLESS[key]}. Leave it out.")
    elif key == "teacher_mode":
        yield f"teacher.mode={'served' if value == 'network' else value}"
    elif key == "model_variant":
        yield f"model=retnet_{value.lower()}"
    elif key == "arch.loss.loss_type":
        yield f"objective.form={value.removesuffix('_cross_entropy')}"
    elif key in NAMES:
        yield f"{NAMES[key]}={value}"
    elif key.startswith("arch."):
        yield f"model.{key.removeprefix('arch.')}={value}"
    else:
        yield f"{name}={value}"


def _on(key: str, value: str) -> bool:
    if value.strip().lower() not in TRUE + FALSE:
        raise ConfigError(f"{key}={value} is not possible; it must be true or false.")
    return value.strip().lower() in TRUE


def _batch(value: str, micro: str | None) -> Iterator[str]:
    if micro is None:
        yield f"training.micro_batch_size={value}"
        yield "training.gradient_accumulation_steps=1"
        return
    whole, part = (int(text) if text.isdecimal() else 0 for text in (value, micro))
    if not part or whole % part:
        raise ConfigError(
            f"global_batch_size={value} is no multiple of training.micro_batch_size={micro}, the "
            f"examples of one pass. The nearest that fits:\n"
            f"  global_batch_size={max(1, round(whole / max(part, 1))) * max(part, 1)}"
        )
    yield f"training.gradient_accumulation_steps={whole // part}"


def option(name: str, following: str | None) -> tuple[str, bool]:
    """The key that ``--name`` is, and whether it is complete without the word that follows."""
    key = name.replace("-", "_")
    return key, key in SWITCHES and (following or "").lower() not in TRUE + FALSE


def recipe_of(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe that ``--config FILE`` is here, and the other words; None where there is none.

    The documents' two files are recipes, which need no file; another one has to be there.
    """
    rest = list(words)
    for place, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name != "--config":
            continue
        taken = 1 if equals else 2
        value = value if equals else "".join(rest[place + 1 : place + 2])
        del rest[place : place + taken]
        known = CONFIGS.get(Path(value).stem)
        if known is None and not Path(value).is_file():
            raise ConfigError(
                f"There is no configuration {value or 'after --config'}. Those of the original "
                "quickstart are recipes here:\n"
                + "\n".join(f"  thimble train {n}" for n in CONFIGS.values())
            )
        return (value if Path(value).is_file() else known), rest
    return None, rest
