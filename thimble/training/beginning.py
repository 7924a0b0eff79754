"""What a run's weights begin as, where they are not drawn."""

from __future__ import annotations

from typing import Any

import torch

from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import DataError
from thimble.models import interop
from thimble.models.causal_lm import CausalLM
from thimble.models.from_teacher import begin
from thimble.models.recursive import RecursiveLM
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer
from thimble.training import checkpoint
from thimble.training.rows import open_rows


def with_weights(model: CausalLM | RecursiveLM, config: Config, data: Any) -> None:
    """Fill ``model`` with the weights the configuration names, if it does."""
    if config.training.load_checkpoint is not None:
        checkpoint.begin_with(model, config.training.load_checkpoint)
    elif config.training.init_from_teacher:
        assert isinstance(model, CausalLM)
        _as_teacher(model, config, data)


def _as_teacher(model: CausalLM, config: Config, data: Any) -> None:
    """As much of the teacher's weights as there is room for. Raises DataError when they are not
    there, of another vocabulary, or in parts."""
    from thimble.teachers import open_examples
    from thimble.teachers.models import check_vocabulary, find

    directory, wanted = find(config.teacher.path or ""), config.training.sequence_length
    check_vocabulary(directory, open_examples(config.data.folder, "train", wanted))
    teacher = interop.load_model(directory)
    if not isinstance(teacher, CausalLM) or teacher.config.mixer != "attention":
        raise DataError(
            "A student can begin with the weights of a llama or mistral, and the model in "
            f"{directory} is none."
        )
    if config.teacher.adapter is not None:
        raise DataError(
            "A student can begin with the weights of a teacher that is whole, not of "
            f"{directory} with {config.teacher.adapter}. Name the merged checkpoint with "
            "teacher.path, without teacher.adapter."
        )
    length = min(wanted, teacher.config.max_position_embeddings)
    rows = open_rows(data, wanted, config.seed)
    ids = rows.batch(0, max(1, 4096 // wanted)).inputs[:, :length]
    begin(model, teacher, torch.from_numpy(ids))
    log.info("beginning with the weights of the teacher %s", directory)


def check_words(config: Config, ours: Tokenizer | None) -> None:
    """Refuse ``training.load_checkpoint`` that knows other words by the same ids: a DataError."""
    if config.training.load_checkpoint is None or ours is None:
        return
    directory = checkpoint.resolve(config.training.load_checkpoint)
    if not any(directory.glob("tokenizer*")):
        return
    if load_tokenizer(directory).fingerprint != ours.fingerprint:
        raise DataError(
            f"{directory} was trained with another tokenizer than that of {config.data.path}: its "
            "weights would read other words. Make the data with the checkpoint's own:\n"
            f"  dataset.tokenizer_path={directory}"
        )
