"""Artefacts on disk: written beside, fsynced and renamed, each with a manifest.

An artefact is a directory with a ``manifest.json`` that says what made it: inputs with their
sha256, options, versions and counts, and the size and sha256 of every file in it. Nothing
half-written ever has the final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thimble.console import log
from thimble.errors import DISK_FULL, DataError, EnvironmentProblem, disk_problem

MANIFEST = "manifest.json"
FORMAT = 1
TEMPORARY = ".incomplete-"
LOCK = ".lock"


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's content as hex, read in one pass of constant memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """A short stable name for any JSON value: the same inputs and options give the same name."""
    return sha256_bytes(json.dumps(value, sort_keys=True, default=str).encode())[:16]


def fsync(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it into place.

    Raises EnvironmentProblem when the disk is full; the temporary file is removed then, and
    whatever stood under the final name before still stands there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_problem(error, path) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def plain(value: Any) -> Any:
    """A value as JSON holds it: paths are texts, and NaN and Inf, which it does not have, null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Parse a JSON file; a missing or broken one is a DataError that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}. Make it again.") from error


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside ``path``; on success it takes that name.

    What stood there before is moved aside first and removed last, so a crash at any moment leaves
    either the old or the new directory complete. On any error the temporary directory is removed
    and the old one stays. A full disk becomes an EnvironmentProblem.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            fsync(file)
        fsync(temporary)
        aside = path.with_name(f"{TEMPORARY}{path.name}-old-{os.getpid()}")
        if path.exists():
            os.rename(path, aside)
        os.rename(temporary, path)
        fsync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_problem(error, path) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(path: Path) -> None:
    """Remove what a process that died left beside ``path``; what a living one writes stays."""
    for leftover in path.parent.glob(f"{TEMPORARY}{path.name}-*"):
        owner = leftover.name.rsplit("-", 1)[-1]
        if owner.isdigit() and Path(f"/proc/{owner}").exists() and int(owner) != os.getpid():
            continue
        if f"{TEMPORARY}{path.name}-old-" in leftover.name and not path.exists():
            os.rename(leftover, path)  # died between the two renames: the old one is still whole
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def versions(*packages: str) -> dict[str, str]:
    """Versions of python, thimble and the named distributions, for a manifest."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("thimble-lm", *packages):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def write_manifest(
    directory: Path,
    kind: str,
    *,
    inputs: Any,
    options: Mapping[str, Any],
    counts: Mapping[str, Any],
    packages: tuple[str, ...] = (),
    files: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write ``manifest.json`` into a directory whose other files are complete; return it.

    ``files``: bytes and sha256 by name, where they are known already. ``fingerprint`` covers kind,
    inputs and options: equal fingerprints mean the same artefact.
    """
    files = files or {
        file.relative_to(directory).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST and file.name != LOCK
    }
    manifest = {
        "kind": kind,
        "format": FORMAT,
        "fingerprint": fingerprint([kind, FORMAT, inputs, dict(options)]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(*packages),
        "inputs": inputs,
        "options": dict(options),
        "counts": dict(counts),
        **more,
        "files": dict(files),
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def kind(directory: str | Path) -> str | None:
    """What an artefact is, by its manifest; None where there is none, as beside the puzzles of
    other programs. Raises DataError for a manifest that is not ours."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if not isinstance(found, str):
        raise DataError(
            f"{directory} is the work of another program: its {MANIFEST} names no kind. Make it "
            "again of its texts (`thimble tokens build`; of JSONL or parquet also `thimble tokens "
            "pack`), its conversations (`thimble conversations build`) or its puzzles (`thimble "
            "puzzles build`)."
        )
    return found


def read_manifest(directory: str | Path, kind: str, *, make: str) -> dict[str, Any]:
    """The manifest of an artefact of ``kind``; ``make`` is the command that produces one.

    Raises DataError when the directory is missing, holds no manifest, or is of another kind.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"There is no {kind} at {directory}. Make it with:\n  {make}")
    if not (directory / MANIFEST).is_file():
        raise DataError(
            f"{directory} has no {MANIFEST}, so it is not a complete {kind}. "
            f"Make it with:\n  {make}"
        )
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else None
        raise DataError(f"{directory} is a {found or 'folder of another program'}, not a {kind}.")
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{directory} was written in format {manifest.get('format')}, this version reads "
            f"{FORMAT}. Make it again with:\n  {make}"
        )
    return manifest


def damaged_files(directory: Path, manifest: Mapping[str, Any], *, hashes: bool) -> list[str]:
    """What is wrong with an artefact's files, one line each; empty when all is well.

    Sizes are always compared; ``hashes=True`` reads every file and compares its sha256 as well.
    """
    problems = []
    for name, facts in manifest.get("files", {}).items():
        file = directory / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}")
        elif hashes and sha256_file(file) != facts["sha256"]:
            problems.append(f"{name} does not have the sha256 of the manifest")
    return problems


def is_current(directory: str | Path, kind: str, inputs: Any, options: Mapping[str, Any]) -> bool:
    """Whether ``directory`` already holds this artefact, complete, made from the same things."""
    directory = Path(directory)
    try:
        manifest = read_manifest(directory, kind, make="")
    except DataError:
        return False
    # Through JSON once, since that is what the manifest on disk has been through.
    same = json.loads(json.dumps([inputs, dict(options)], default=str))
    return [manifest["inputs"], manifest["options"]] == same and not damaged_files(
        directory, manifest, hashes=False
    )


@contextlib.contextmanager
def locked(directory: str | Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a directory for one process; a second one gets a clear EnvironmentProblem, or waits.

    The lock is the kernel's (flock): it goes with the process, however that ends.
    """
    import fcntl

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            if not wait:
                raise EnvironmentProblem(
                    f"Process {owner} is writing to {what} {directory}. "
                    "Wait for it to end, or choose another folder."
                ) from None
            log.info("waiting for process %s, which is writing to %s %s", owner, what, directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
