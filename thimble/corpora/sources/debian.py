"""Debian packages fetched with ``apt-get download`` into the cache: no root, nothing installed.

What is in the cache is used without asking the network, so a second build works offline and from
the same bytes. Delete the cache folder to get newer versions.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from thimble.artifacts import read_json, sha256_file, write_json, write_text
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
            fields = control(path)
            found[pattern] = Package(name, fields["Version"], path, sha256_file(path))
    return found


def control(path: Path) -> dict[str, str]:
    """The fields of a package's control file: ``Package``, ``Version``, ``Description``, ..."""
    with archives.whole(path):
        for name, content in archives.files(path, "control.tar"):
            if name == "control":
                return next(stanzas(content.read().decode("utf-8", "replace").splitlines()), {})
    raise DataError(f"{path} has no control file. Delete it and run the same command again.")


@functools.cache
def source_of(package: Package) -> str:
    """The name of the source a package was built from."""
    fields = control(package.path)
    return fields.get("Source", fields["Package"]).split()[0]


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Paragraphs of ``Field: value`` lines with indented continuations (deb822)."""
    fields: dict[str, str] = {}
    last = ""
    for line in lines:
        if not line.strip():
            if fields:
                yield fields
            fields, last = {}, ""
        elif line[0] in " \t":
            if last:
                fields[last] += "\n" + line.rstrip()
        elif ":" in line:
            last, _, value = line.partition(":")
            fields[last] = value.strip()
    if fields:
        yield fields


# Debian's short names of licences, as SPDX writes them.
SPDX = {
    "gpl": "GPL-1.0-or-later", "gpl-2": "GPL-2.0-only", "gpl-2+": "GPL-2.0-or-later",
    "gpl-3": "GPL-3.0-only", "gpl-3+": "GPL-3.0-or-later", "gpl-1+": "GPL-1.0-or-later",
    "lgpl-2": "LGPL-2.0-only", "lgpl-2+": "LGPL-2.0-or-later", "lgpl-2.1": "LGPL-2.1-only",
    "lgpl-2.1+": "LGPL-2.1-or-later", "lgpl-3": "LGPL-3.0-only", "lgpl-3+": "LGPL-3.0-or-later",
    "bsd-2-clause": "BSD-2-Clause", "bsd-3-clause": "BSD-3-Clause", "bsd-4-clause": "BSD-4-Clause",
    "apache-2.0": "Apache-2.0", "apache-2": "Apache-2.0", "artistic": "Artistic-1.0-Perl",
    "expat": "MIT", "mit": "MIT", "isc": "ISC", "zlib": "Zlib", "public-domain": "public-domain",
    "gfdl-1.2+": "GFDL-1.2-or-later", "gfdl-1.3+": "GFDL-1.3-or-later", "x11": "X11",
    "gfdl-niv-1.3+": "GFDL-1.3-no-invariants-or-later", "curl": "curl", "cc0-1.0": "CC0-1.0",
    "gpl-2.0": "GPL-2.0-only", "gpl-2.0+": "GPL-2.0-or-later", "gpl-3.0": "GPL-3.0-only",
    "gpl-3.0+": "GPL-3.0-or-later", "lgpl-2.0+": "LGPL-2.0-or-later", "pd": "public-domain",
    "bsd-mit": "MIT", "mit/x11": "MIT", "gpl+": "GPL-1.0-or-later",
    "mpl-2.0": "MPL-2.0", "agpl-3+": "AGPL-3.0-or-later",
}  # fmt: skip
# For copyright files that are prose: the first sign that is found decides.
SIGNS = (
    ("GPL-3.0-or-later", r"version 3 of the License, or"),
    ("LGPL-2.1-or-later", r"Lesser General\s+Public\s+License"),
    ("GPL-2.0-or-later", r"version 2 of the License, or|version 2, or \(at your option\)"),
    ("GPL-2.0-only", r"version 2 (?:of|as)|common-licenses/GPL-2"),
    ("GPL-3.0-or-later", r"common-licenses/GPL-3"),
    ("GPL-1.0-or-later", r"General\s+Public\s+License"),
    ("Apache-2.0", r"Apache License"),
    ("BSD-3-Clause", r"Redistribution and use in source"),
    ("MIT", r"Permission is hereby granted, free of charge"),
)


def licence_of(copyright_file: str) -> str:
    """The licence of a package in SPDX's words, read from its copyright file; else "unknown".

    In a machine-readable file the licence of ``Files: *`` counts, the one of what is not listed
    apart. Packages hold parts under other licences; this names the one of the whole.
    """
    if "Format:" in copyright_file[:400]:
        for fields in stanzas(copyright_file.splitlines()):
            if fields.get("Files", "").split()[:1] == ["*"] and "License" in fields:
                words = fields["License"].split("\n")[0].strip().replace(",", "").split()
                names = {"or": "OR", "and": "AND", "and/or": "OR"}
                return " ".join(names.get(w.lower()) or SPDX.get(w.lower(), w) for w in words)
    for licence, sign in SIGNS:
        if re.search(sign, copyright_file):
            return licence
    return "unknown"


def descriptions() -> Package | None:
    """One line about each package of the sections that concern a system, from apt's own lists.

    Kept in the cache like a download, so later builds use the same ones. None without apt.
    """
    path = cache_folder() / "downloads" / "package-descriptions.txt"
    if path.is_file() and (package := package_in(path)):
        return package
    if not available():
        return None
    sections = {"admin", "kernel", "net", "utils", "shells", "hardware", "devel", "httpd", "mail"}
    known: dict[str, str] = {}
    for fields in stanzas(_run(["apt-cache", "dumpavail"]).splitlines()):
        about = fields.get("Description") or fields.get("Description-en") or ""
        section = fields.get("Section", "").rsplit("/", 1)[-1]
        if section in sections and about:
            name = fields["Package"]
            known[name] = (
                f"Package: {name}\nSection: {section}\nDescription: {about.splitlines()[0]}\n"
            )
    write_text(path, "\n".join(known[name] for name in sorted(known)))
    package = Package("package-descriptions", str(len(known)), path, sha256_file(path))
    write_json(path.with_name(path.name + ".json"), package.facts())
    return package


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
    if not names and not found:
        raise EnvironmentProblem(
            "apt knows none of the packages this corpus is made of. Refresh its lists with "
            "`apt-get update` (as root), or give a folder of packages with --from FOLDER."
        )
    for pattern, name in wanted.items():
        if name is None:
            log.warning("apt knows no package %s; the corpus is made without it.", pattern)
    fetched = _download(names, folder) if names else {}
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
            "what was fetched is kept. Without network, give a folder of them with --from FOLDER."
        )
    return done.stdout
