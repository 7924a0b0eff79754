"""One teacher for all runs of a sweep: loaded once, and asked once for all that any run asks of it.

Runs that learn from one teacher by the same rows of the same data read one cache. It has the most
tokens and all temperatures any of them wants, from which fewer follow exactly, since the mass of
the tail is kept at each temperature. Draws are of one temperature and one seed: only runs that have
these in common share them. A run alone with its question asks its teacher itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import EnvironmentProblem
from thimble.teachers import Asked, open_examples

# By ``question``: what is said of the teacher of a run once its answers are in a cache.
Caches = dict[str, dict[str, Any]]


def question(config: Config) -> str | None:
    """Equal for runs that can read one cache; None for one that asks no teacher it could share."""
    from thimble.training.distillation import asked_of

    teacher = config.teacher
    if config.objective.name != "distill" or teacher.mode != "direct":
        return None
    asked = asked_of(config)
    return json.dumps(
        {
            "teacher": [teacher.path, teacher.adapter, teacher.cache],
            "device": [config.device, config.precision],
            "data": [*config.data.model_dump().values(), config.training.sequence_length],
            "draws": [*asked.temperatures, asked.seed] if teacher.sampled else None,
        }
    )


def prepare(configs: Sequence[Config], *, here: bool) -> Caches:
    """Ask every teacher that several of these runs have in common. What was asked before, by this
    sweep or another, is not asked again.

    ``here``: the runs are made in this process. Where others have a device that is missing here,
    each of them asks by itself.
    """
    groups: dict[str, list[Config]] = {}
    for config in configs:
        if key := question(config):
            groups.setdefault(key, []).append(config)
        elif config.objective.name == "distill" and config.teacher.mode == "cached":
            check(config)
    caches: Caches = {}
    for key, runs in groups.items():
        if len(runs) == 1:
            continue
        try:
            caches[key] = ask(runs)
        except EnvironmentProblem as error:
            if here:
                raise
            log.warning("the teacher is asked by each run: %s", error)
    if alone := sum(len(runs) == 1 for runs in groups.values()):
        log.info(
            "%d of the runs %s a teacher with nobody else: another teacher, other data, or draws "
            "at another temperature or seed", alone, "asks" if alone == 1 else "ask",
        )  # fmt: skip
    if any(config.teacher.mode == "served" for config in configs if _distills(config)):
        log.info("a served teacher is asked by every run anew; `thimble teacher cache` asks once")
    return caches


def _distills(config: Config) -> bool:
    return config.objective.name == "distill"


def check(config: Config) -> None:
    """Raise DataError where the cache of a run does not hold what it asks for."""
    import torch

    from thimble.training.distillation import open_teacher

    examples = open_examples(config.data.folder, "train", config.training.sequence_length)
    open_teacher(config, examples, torch.device("cpu"))


def ask(runs: Sequence[Config]) -> dict[str, Any]:
    """Fill the cache that serves all of ``runs``: rows they will see, and what they hold out.

    Returns what then is to be said of their teacher.
    """
    from thimble.teachers import held_out
    from thimble.teachers.direct import DirectTeacher
    from thimble.teachers.fill import fill, home
    from thimble.training import devices
    from thimble.training.distillation import answering, held_out_rows

    first = runs[0]
    device = devices.resolve_device(first.device)
    examples = open_examples(first.data.folder, "train", first.training.sequence_length)
    asked = union(runs, examples.vocab_size)
    teacher = answering(first, examples, asked, device)
    assert isinstance(teacher, DirectTeacher)
    folder = home(first.data.folder, "train", examples, teacher)
    if first.teacher.cache_logits:
        folder = Path(first.teacher.cache or folder)
    made_by = {"teacher": first.teacher.path, "adapter": first.teacher.adapter}
    made_by |= {"data": first.data.path, "for": "a sweep"}
    rows = np.unique(np.concatenate([seen(config) for config in runs]))
    made = fill(folder, examples, teacher, made_by=made_by, rows=rows)
    k = min(max(config.teacher.topk for config in runs), examples.vocab_size)
    for_evaluation = DirectTeacher(teacher.loaded, Asked(k), examples.vocab_size, teacher.identity)
    judged = {c.evaluation.max_tokens: c for c in runs if c.training.eval_every}
    for config in judged.values():
        wanted = held_out_rows(config, examples)
        if held_out.find(folder, wanted, for_evaluation.asked, teacher.identity) is None:
            held_out.keep(folder, wanted, for_evaluation)
    log.info(
        "%s for %d runs: %s tokens, %s %s at temperature %s, %.1f MB in %s",
        "teacher asked once" if made.asked_now else "teacher was asked before",
        len(runs), f"{made.positions:,}", asked.k, "draws" if asked.sampled else "likeliest",
        ", ".join(f"{t:g}" for t in asked.temperatures), made.bytes / 1e6, folder,
    )  # fmt: skip
    return {"mode": "cached", "cache_logits": False, "cache": str(folder)}


def union(runs: Sequence[Config], vocabulary: int) -> Asked:
    """What all of these runs ask together."""
    from thimble.training.distillation import asked_of, within

    each = [asked_of(config) for config in runs]
    levels = sorted({level for asked in each for level in asked.temperatures})
    k = max(asked.k for asked in each)
    return within(Asked(k, tuple(levels), each[0].sampled, each[0].seed), vocabulary)


def seen(config: Config) -> np.ndarray:
    """Numbers of the rows that a run will learn from."""
    from thimble.training.data import open_data
    from thimble.training.plan import total_steps
    from thimble.training.rows import open_rows

    training = config.training
    rows = open_rows(open_data(config), training.sequence_length, config.seed)
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    count = total_steps(config, rows.count) * batch
    # A step that would touch what is skipped begins after it: up to a batch is passed over, too.
    count += sum(end - begin + batch - 1 for begin, end in training.skip_windows)
    if count >= rows.count:  # an epoch has all of them
        return np.arange(rows.count)
    return rows.order(0, count)


def taught(config: Config, caches: Caches) -> Config:
    """The run as it reads its cache, where there is one for it."""
    found = caches.get(question(config) or "")
    if found is None or not _serves(config, found["cache"]):
        return config
    tree: dict[str, Any] = config.model_dump(mode="python")
    tree["teacher"] |= found
    return Config.model_validate(tree)


def _serves(config: Config, folder: str) -> bool:
    """Of drawn values a run may want more than any that was looked at, or other rows."""
    from thimble.teachers.cache import TeacherCache
    from thimble.training.distillation import asked_of, within

    cache = TeacherCache(folder)
    have, want = cache.asked, within(asked_of(config), cache.description["vocab_size"])
    enough = have.k >= want.k and set(want.temperatures) <= set(have.temperatures)
    return enough and bool(cache.filled(seen(config)).all())
