"""Tasks of EleutherAI's lm-evaluation-harness on a checkpoint as it is (extra ``eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from thimble.console import unlogged
from thimble.errors import ConfigError, EnvironmentProblem


def check() -> None:
    """Raise EnvironmentProblem when the harness is not installed."""
    try:
        with unlogged():
            import lm_eval  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            "--tasks needs lm-evaluation-harness. Install it with:\n"
            "  pip install 'thimble-lm[eval]'"
        ) from error


def run(
    directory: Path, tasks: Sequence[str], limit: int | None, device: torch.device
) -> dict[str, Any]:
    """Score tasks by name (their data come from the hub) or by the path of a task's YAML file.

    Returns for each task ``accuracy`` (normalised by length where the task has that, else plain),
    the ``metric`` it is, its ``standard_error`` and the number of ``items``. The checkpoint is
    loaded by transformers, in float32. Raises ConfigError for an unknown task and
    EnvironmentProblem when a task's data cannot be had.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"There is no task file {missing[0]}.")
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    names = [_name(Path(task)) if Path(task) in files else task for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"lm-evaluation-harness has no task {unknown[0]}. All it has: lm-eval ls tasks"
        )
    tags = [name for name in names if name in manager.all_tags]
    if tags:
        raise ConfigError(
            f"{tags[0]} is a tag of several tasks, which have no figure together. Name the tasks "
            "themselves: lm-eval ls tasks"
        )
    try:
        with unlogged():
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(directory), "dtype": "float32"},
                tasks=names,
                limit=limit,
                device=str(device),
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (OSError, ConnectionError) as error:
        raise EnvironmentProblem(
            f"The data of {', '.join(names)} could not be had: {error}. They come from the hub "
            "(HF_HUB_OFFLINE unset, network reachable), or from files of your own task."
        ) from error
    return {name: _figures(found, name) for name in names}


def _name(file: Path) -> str:
    import yaml

    class Plain(yaml.SafeLoader):
        """Reads the name only; the harness itself resolves its tags (!function)."""

    Plain.add_multi_constructor("!", lambda loader, suffix, node: None)
    value = yaml.load(file.read_text(encoding="utf-8"), Plain)
    if not isinstance(value, dict) or "task" not in value:
        raise ConfigError(f"{file} has no key `task`, so it is no task of the harness.")
    return str(value["task"])


def _figures(found: dict[str, Any], name: str) -> dict[str, Any]:
    values = found["results"].get(name) or found["groups"][name]
    metrics = {key.split(",")[0]: value for key, value in values.items() if "," in key}
    metric = next((m for m in ("acc_norm", "acc", "exact_match") if m in metrics), None)
    items = found.get("n-samples", {}).get(name, {}).get("effective")
    if metric is None:
        return {"accuracy": None, "metric": None, "items": items, "all": metrics}
    accuracy = float(metrics[metric])
    error = (accuracy * (1 - accuracy) / items) ** 0.5 if items else None
    return {"accuracy": accuracy, "metric": metric, "standard_error": error, "items": items}
