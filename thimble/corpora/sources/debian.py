"""Debian packages fetched with ``apt-get download`` into the cache: no root, nothing installed.

What is in the cache is used without asking the network, so a second build works offline and from
the same bytes. Delete the cache folder to get newer versions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from thimble.artifacts import read_json, sha256_file, write_json
from thimble.console import log
from thimble.corpora.sources import archives
from thimble.errors import DISK_FULL, DataError, EnvironmentProblem, disk_problem


@dataclass(frozen=True)
class Package:
    """One downloaded archive: where it lies and what it is."""

    name: str
    version: str
    path: Path
    sha256: str

    def facts(self) -> dict[str, str]:
        return {"name": self.name, "version": self.version, "sha256": self.sha256}


def cache_folder() -> Path:
    """``$THIMBLE_HOME``, else ``$XDG_CACHE_HOME/thimble``, else ``~/.cache/thimble``."""
    if home := os.environ.get("THIMBLE_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "thimble"


def available() -> bool:
    return shutil.which("apt-get") is not None and shutil.which("apt-cache") is not None


def natural(name: str) -> list[int | str]:
    """Sort key that puts 6.12 after 6.1; text and numbers alternate, so keys always compare."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def newest(pattern: str, names: list[str]) -> str | None:
    """The name with the highest version among those that match the whole ``pattern``."""
    matching = [name for name in names if re.fullmatch(pattern, name)]
    return max(matching, key=natural, default=None)


def package_in(path: Path) -> Package | None:
    """A cached package whose sha256 is still that of its download; None when damaged."""
    record = path.with_name(path.name + ".json")
    if not record.is_file():
        return None
    facts = read_json(record)
    if sha256_file(path) != facts["sha256"]:
        log.warning("%s is damaged and will be fetched again.", path)
        return None
    return Package(facts["name"], facts["version"], path, facts["sha256"])


def in_folder(folder: Path, patterns: list[str]) -> dict[str, Package]:
    """The packages lying in ``folder``, by the pattern of ``patterns`` they answer."""
    by_name: dict[str, Path] = {}
    for path in sorted(folder.glob("*.deb"), key=lambda path: natural(path.name)):
        by_name[path.name.split("_")[0]] = path
    found = {}
    for pattern in patterns:
        if name := newest(pattern, list(by_name)):
            path = by_name[name]
            fields = archives.control(path)
            found[pattern] = Package(name, fields["Version"], path, sha256_file(path))
    return found


def fetch(patterns: list[str]) -> dict[str, Package]:
    """Packages for the given name patterns, from the cache or downloaded into it.

    A pattern that no known package answers is left out of the result with a warning.
    Raises EnvironmentProblem when apt knows no packages at all or the download fails.
    """
    folder = cache_folder() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    cached: dict[str, Path] = {}
    for path in sorted(folder.glob("*.deb"), key=lambda path: natural(path.name)):
        cached[path.name.split("_")[0]] = path
    found: dict[str, Package] = {}
    for pattern in patterns:
        name = newest(pattern, list(cached))
        if name and (package := package_in(cached[name])):
            found[pattern] = package
    absent = [pattern for pattern in patterns if pattern not in found]
    if not absent:
        return found
    known = _run(["apt-cache", "pkgnames"]).split()
    wanted = {pattern: newest(pattern, known) for pattern in absent}
    names = sorted({name for name in wanted.values() if name})
    if not names:
        raise EnvironmentProblem(
            "apt knows none of the packages this corpus is made of. Refresh its lists with "
            "`apt-get update` (as root), or give a folder that holds the packages with --local."
        )
    for pattern, name in wanted.items():
        if name is None:
            log.warning("apt knows no package %s; the corpus is made without it.", pattern)
    fetched = _download(names, folder)
    found |= {pattern: fetched[name] for pattern, name in wanted.items() if name}
    return found


def _download(names: list[str], folder: Path) -> dict[str, Package]:
    log.info("Fetching %d packages with apt-get download ...", len(names))
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder) as temporary:
        try:
            # apt checks every file against the sha256 of its signed lists.
            _run(["apt-get", "download", "-q", *names], cwd=temporary)
            fetched = {}
            for path in sorted(Path(temporary).glob("*.deb")):
                name, version = path.name.split("_")[:2]
                package = Package(name, unquote(version), folder / path.name, sha256_file(path))
                os.replace(path, package.path)
                write_json(package.path.with_name(path.name + ".json"), package.facts())
                fetched[name] = package
        except OSError as error:
            if error.errno in DISK_FULL:
                raise disk_problem(error, folder) from error
            raise
    missing = sorted(set(names) - set(fetched))
    if missing:
        raise DataError(f"apt-get download brought no file for {', '.join(missing)}.")
    return fetched


def _run(command: list[str], cwd: str | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        problems = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        reason = "\n  ".join(problems[:5] or done.stderr.splitlines()[-3:])
        raise EnvironmentProblem(
            f"`{' '.join(command[:2])}` failed:\n  {reason}\n"
            "Check the network (and `apt-get update`), then run the same command again; "
            "what was fetched is kept. Without network, give a folder of packages with --local."
        )
    return done.stdout
