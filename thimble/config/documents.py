"""The keys of other programs as keys of ours, understood as they stand in their documents.

Of the recursive models (TRM, HRM, their SlimOrca fork): ``global_batch_size=48 epochs=1
arch.L_cycles=4``; of the distillation into a RetNet: ``teacher_topk=512 distill_alpha=0.5``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
    "max_grad_norm": "optim.grad_clip",
    "max_steps": "training.max_steps",
    "max_seq_length": "training.sequence_length",
    "physical_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "log_interval": "training.log_every",
    "save_interval": "training.save_every",
    "keep_last_n": "training.keep_last",
    "train_data_path": "data.path",
    "teacher_mode": "teacher.mode",
    "teacher_model": "teacher.path",
    "teacher_adapter_path": "teacher.adapter",
    "teacher_url": "teacher.url",
    "teacher_topk": "teacher.topk",
    "teacher_temperature": "objective.temperature",
    "teacher.temperature": "objective.temperature",
    "cache_logits": "teacher.cache_logits",
    "cache_dir": "teacher.cache",
    "distill_alpha": "objective.distill_alpha",
    "enable_saddle_interventions": "saddle.interventions",
}
# The moving average is a number of ours, and a switch of theirs with this number.
EMA_RATE = "0.999"


def translate(overrides: Iterable[str]) -> Iterator[str]:
    """``key=value`` lines with the documents' names as lines with ours; others pass as they are.

    ``global_batch_size=N`` is N examples in one pass, or as many passes as a given
    ``training.micro_batch_size`` makes of it. Raises ConfigError when that does not divide.
    """
    lines = list(overrides)
    given = dict(line.lstrip("+").partition("=")[::2] for line in lines)
    for line in lines:
        key, equals, value = line.partition("=")
        key = key.lstrip("+").strip()
        if not equals:
            yield line
        elif key == "global_batch_size":
            yield from _batch(value, given.get("training.micro_batch_size"))
        elif key == "ema":
            on = value.strip().lower() in ("true", "1", "yes")
            yield f"optim.ema_rate={given.get('ema_rate', EMA_RATE) if on else 'null'}"
        elif key == "ema_rate" and "ema" in given:
            continue
        elif key == "arch.mlp_t":
            on = value.strip().lower() in ("true", "1", "yes")
            yield f"model.mixer={'mlp' if on else 'attention'}"
        elif key == "arch.no_ACT_continue":
            off = value.strip().lower() in ("true", "1", "yes")
            yield f"model.q_continue={'false' if off else 'true'}"
        elif key == "arch.loss.loss_type":
            yield f"objective.form={value.removesuffix('_cross_entropy')}"
        elif key in NAMES:
            yield f"{NAMES[key]}={value}"
        elif key.startswith("arch."):
            yield f"model.{key.removeprefix('arch.')}={value}"
        else:
            yield line


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
