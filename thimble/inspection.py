"""What a folder of ours is, in words: any artefact by its manifest, a run by its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thimble.artifacts import MANIFEST, damaged_files, read_json, sha256_file
from thimble.config.load import CONFIG_FILE, load_run
from thimble.errors import DataError

LEDGER = "sweep.json"


def inspect(path: Path) -> dict[str, Any]:
    """Kind, counts, options, inputs and state of an artefact or a run.

    Every file is compared with the sha256 in the manifest. Raises DataError when the folder is
    missing, or is none of ours.
    """
    if not path.exists():
        raise DataError(f"There is nothing at {path}.")
    beside = path.with_name(f"{path.name}.json")
    if path.is_file() and beside.is_file():
        return _exported(path, beside)
    if path.is_file():
        path = path.parent
    if (path / MANIFEST).is_file():
        return _artefact(path)
    if (path / CONFIG_FILE).is_file():
        return _run(path)
    if (path / LEDGER).is_file():
        return read_json(path / LEDGER)
    raise DataError(
        f"{path} is none of ours: it has neither a {MANIFEST} (corpus, tokens, checkpoint) "
        f"nor a {CONFIG_FILE} (run) nor a {LEDGER} (sweep)."
    )


def _exported(path: Path, manifest: Path) -> dict[str, Any]:
    """A file for another program, by the manifest beside it."""
    found = read_json(manifest)
    if not isinstance(found, dict) or found.get("kind") != "deployment":
        raise DataError(f"{manifest} does not describe {path.name}: it is no manifest of ours.")
    whole = sha256_file(path) == found["file"]["sha256"]
    return {
        "kind": f"exported model, {found['type']}",
        "path": str(path),
        "state": "complete, as it was written" if whole else "damaged: its sha256 is another",
        **{key: value for key, value in found.items() if key not in ("kind", "format", "type")},
    }


def _artefact(path: Path) -> dict[str, Any]:
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or "kind" not in manifest:
        raise DataError(f"{path / MANIFEST} was not written by thimble: it names no kind.")
    files = manifest.get("files", {})
    damage = damaged_files(path, manifest, hashes=True)
    shown = {
        key: manifest[key]
        for key in ("created", "fingerprint", "counts", "checks", "options", "inputs", "versions")
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
    from thimble.training.run import RunFolder  # imports torch

    config, run = load_run(path), RunFolder(path)
    records = run.records()
    training = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "val_loss" in record]
    best, latest = run.pointed("best"), run.pointed("latest")
    return {
        "kind": "run",
        "path": str(path),
        "recipe": config.recipe,
        "parameters": config.model.num_parameters,
        "steps": f"{training[-1]['step'] if training else 0} of {config.training.max_steps}",
        "last training record": training[-1] if training else None,
        "last evaluation": evaluations[-1] if evaluations else None,
        "events": [record for record in records if "event" in record],
        "checkpoints": sorted(folder.name for folder in run.checkpoints.glob("step-*")),
        "latest": latest.name if latest else None,
        "best": best.name if best else None,
    }
