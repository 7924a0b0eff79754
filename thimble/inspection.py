"""What a folder of ours is, in words: any artefact by its manifest, a run by its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thimble.artifacts import MANIFEST, damaged_files, read_json
from thimble.config.load import CONFIG_FILE, load_run
from thimble.errors import DataError


def inspect(path: Path) -> dict[str, Any]:
    """Kind, counts, options, inputs and state of an artefact or a run.

    Every file is compared with the sha256 in the manifest. Raises DataError when the folder is
    missing, or is none of ours.
    """
    if not path.exists():
        raise DataError(f"There is nothing at {path}.")
    if path.is_file():
        path = path.parent
    if (path / MANIFEST).is_file():
        return _artefact(path)
    if (path / CONFIG_FILE).is_file():
        return _run(path)
    raise DataError(
        f"{path} is none of ours: it has neither a {MANIFEST} (corpus, tokens, checkpoint) "
        f"nor a {CONFIG_FILE} (run)."
    )


def _artefact(path: Path) -> dict[str, Any]:
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or "kind" not in manifest:
        raise DataError(f"{path / MANIFEST} was not written by thimble: it names no kind.")
    files = manifest.get("files", {})
    damage = damaged_files(path, manifest, hashes=True)
    shown = {
        key: manifest[key]
        for key in ("created", "fingerprint", "counts", "options", "inputs", "versions")
        if manifest.get(key) not in (None, {}, [])
    }
    return {
        "kind": manifest["kind"],
        "path": str(path),
        "state": "damaged" if damage else "complete, every file as it was written",
        **({"damage": damage} if damage else {}),
        **shown,
        "files": {name: facts["bytes"] for name, facts in files.items()},
    }


def _run(path: Path) -> dict[str, Any]:
    config = load_run(path)
    training: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for record in _records(path / "metrics.jsonl"):
        kinds = {"event": events, "val_loss": evaluations, "loss": training}
        for key, records in kinds.items():
            if key in record:
                records.append(record)
                break
    checkpoints = path / "checkpoints"
    return {
        "kind": "run",
        "path": str(path),
        "recipe": config.recipe,
        "parameters": config.model.num_parameters,
        "steps": f"{training[-1]['step'] if training else 0} of {config.training.max_steps}",
        "last training record": training[-1] if training else None,
        "last evaluation": evaluations[-1] if evaluations else None,
        "events": events,
        "checkpoints": sorted(folder.name for folder in checkpoints.glob("step-*")),
        **{
            name: (checkpoints / name).read_text(encoding="utf-8").strip()
            for name in ("latest", "best")
            if (checkpoints / name).is_file()
        },
    }


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that is still being written is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number} is damaged: {error}.") from error
    return records
