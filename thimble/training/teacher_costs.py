"""What a teacher adds to a run: its weights and what its forward pass needs, or a cache's bytes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from thimble import artifacts
from thimble.config.schema import Config, ModelConfig
from thimble.errors import DataError
from thimble.models import interop
from thimble.models.causal_lm import CausalLM
from thimble.objectives.sparse_targets import SampledTargets, SparseTargets
from thimble.teachers.asked import Targets
from thimble.teachers.cache import position_bytes
from thimble.teachers.direct import DirectTeacher
from thimble.teachers.models import LoadedModel, find

# Of a teacher that our recipes name, so that a plan need not fetch it (its page on the hub).
LLAMA: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
KNOWN = {"meta-llama/Llama-3.2-1B": LLAMA, "meta-llama/Llama-3.2-1B-Instruct": LLAMA}


@dataclass(frozen=True)
class TeacherCosts:
    """``flops_per_token``: of its forward pass, 0 where it is not asked. ``cache_bytes_per_token``
    and ``cache_bytes`` on disk for the whole training split, 0 without a cache."""

    mode: str
    parameters: int | None
    flops_per_token: float
    cache_bytes_per_token: int
    cache_bytes: int


def local_config(config: Config) -> ModelConfig | None:
    """The shape of a teacher that is on this machine, or known by its name; None of any other.
    Nothing is fetched."""
    if config.objective.name != "distill" or config.teacher.path is None:
        return None
    with contextlib.suppress(DataError):
        folder = config.teacher.path
        if not Path(folder).exists() and not folder.startswith("runs"):
            folder = _fetched(folder)
        found = interop.read_config(find(folder))
        return found if found.schedule == "once" else None
    known = KNOWN.get(config.teacher.path)
    return ModelConfig(**known) if known else None


def _fetched(name: str) -> str:
    """Where the hub's copy of a model stands, if it has been fetched before."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):
        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return str(Path(found).parent)
    raise DataError(f"{name} is not here.")


def costs(config: Config, rows: int) -> TeacherCosts | None:
    """Of a run whose data have so many rows; None for one that has no teacher."""
    if config.objective.name != "distill":
        return None
    from thimble.training.distillation import asked_of, within

    options, length = config.teacher, config.training.sequence_length
    shape = local_config(config)
    flops = 0.0
    if options.mode == "direct" and shape is not None:
        flops = forward_flops(shape, length)
    position = 0
    if options.mode == "cached" or options.cache_logits:
        manifest = artifacts.read_json(Path(config.data.folder) / artifacts.MANIFEST)
        vocabulary = manifest["vocab_size"]
        position = position_bytes(within(asked_of(config), vocabulary), vocabulary)
    return TeacherCosts(
        options.mode,
        shape.num_parameters if shape is not None else None,
        flops,
        position,
        position * length * rows,
    )


def forward_flops(shape: ModelConfig, length: int) -> float:
    """Of a token: a third of forward and backward, see ``plan.flops_per_token``."""
    from thimble.training.plan import flops_per_token

    return flops_per_token(shape, length) / 3


def answers(config: Config) -> Targets:
    """Targets of a micro-batch that say nothing, as large as a teacher's are."""
    from thimble.training.distillation import asked_of

    asked, training = asked_of(config), config.training
    shape = (training.micro_batch_size, training.sequence_length, asked.k)
    indices, log_probs = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    if asked.sampled:
        return SampledTargets(indices, torch.ones(shape), log_probs, asked.temperatures[0])
    tails = torch.zeros(*shape[:2], len(asked.temperatures))
    return SparseTargets(indices, log_probs, tails, asked.temperatures)


@dataclass(frozen=True)
class Forward:
    """A teacher as ``DirectTeacher`` wants one, with our own model in place of transformers'."""

    model: CausalLM

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.model.hidden(input_ids))


def ask(model: CausalLM, config: Config, ids: Tensor) -> Targets:
    """What ``model``, as a teacher, says about ``ids``."""
    from thimble.training.distillation import asked_of, within

    loaded = LoadedModel(model, Forward(model), model.head.weight, None, Path())  # type: ignore[arg-type]
    asked = within(asked_of(config), len(model.head.weight))
    teacher = DirectTeacher(loaded, asked, len(model.head.weight), {})
    return teacher.targets(range(len(ids)), ids)
