"""Archives from their makers, for machines without apt: fetched with retry, resumed, checked."""

from __future__ import annotations

import email.message
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from thimble.artifacts import sha256_file, write_json
from thimble.console import log, progress
from thimble.corpora.sources.debian import Package, cache_folder, package_in
from thimble.errors import DISK_FULL, DataError, EnvironmentProblem, disk_problem

# Name -> version and address. Their makers publish no checksum at a fixed address beside each of
# them, so length and archive are checked, and the sha256 is written down in the manifest.
ARCHIVES = {
    "linux-6.12": ("6.12", "https://cdn.kernel.org/pub/linux/kernel/v6.x/linux-6.12.tar.xz"),
    "man-pages-6.9.1": (
        "6.9.1",
        "https://cdn.kernel.org/pub/linux/docs/man-pages/man-pages-6.9.1.tar.xz",
    ),
    "iproute2-6.12.0": (
        "6.12.0",
        "https://cdn.kernel.org/pub/linux/utils/net/iproute2/iproute2-6.12.0.tar.xz",
    ),
    "pci-ids": ("current", "https://pci-ids.ucw.cz/v2.2/pci.ids"),
    "usb-ids": ("current", "http://www.linux-usb.org/usb.ids"),
}
ATTEMPTS = 4
Result = TypeVar("Result")
CHUNK = 1 << 18


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    pause: float = 2.0,
    open_url: Callable[..., http.client.HTTPResponse] = urllib.request.urlopen,
    advice: str = "Without network, give a folder with the archives or packages with --from "
    "FOLDER.",
) -> Path:
    """Fetch ``url`` to ``path``: retried, resumed where it broke off, checked, then renamed.

    What was received stays in ``path.part`` for the next attempt or the next run. Raises
    EnvironmentProblem when the network does not answer or breaks off every time, DataError when
    the content does not have the ``sha256`` it should have. ``advice`` ends the former's message.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)

    def receive() -> None:
        try:
            _receive(url, part, open_url)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            part.unlink(missing_ok=True)  # it is no beginning of what is there now
            raise http.client.HTTPException("what was received before is of another file") from None

    kept = "What was received is kept and will be resumed."
    try:
        retried(url, receive, pause=pause, advice=f"{kept} {advice}")
    except OSError as error:
        raise disk_problem(error, part) from error
    found = sha256_file(part)
    if sha256 and found != sha256:
        part.unlink()
        raise DataError(
            f"{url} does not have the sha256 it should have:\n  expected {sha256}\n"
            f"  received {found}\nIt was deleted. Try again later, or get it from elsewhere."
        )
    os.replace(part, path)
    return path


def retried(url: str, attempt: Callable[[], Result], *, pause: float, advice: str) -> Result:
    """``attempt()``, made again after a pause where the network or the server failed.

    Raises EnvironmentProblem, ended by ``advice``, after ``ATTEMPTS`` of them, and OSError for a
    full disk.
    """
    problem: object = None
    for number in range(ATTEMPTS):
        if number:
            log.info("%s: %s; trying again.", url, problem)
            time.sleep(pause * 2 ** (number - 1))
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            problem = error
            if error.code < 500 and error.code != 429:
                break
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            problem = getattr(error, "reason", None) or error
    raise EnvironmentProblem(f"Could not fetch {url}: {problem}. {advice}")


def _receive(url: str, part: Path, open_url: Callable[..., http.client.HTTPResponse]) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "thimble"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with open_url(request, timeout=30) as answer:
        if have and answer.status != 206:
            have = 0  # the server begins anew
        total = _total(answer.headers, have)
        left = total - have if total else None
        with open(part, "ab" if have else "wb") as file, progress(part.stem, left, "bytes") as step:
            while data := answer.read(CHUNK):
                file.write(data)
                have += len(data)
                step(len(data))
    if total is not None and have != total:
        raise http.client.HTTPException(f"broke off after {have:,} of {total:,} bytes")


def _total(headers: Mapping[str, str] | email.message.Message, have: int) -> int | None:
    length = headers.get("Content-Length")
    return have + int(length) if length and length.isdigit() else None


def fetch() -> dict[str, Package]:
    """All upstream archives, from the cache or downloaded into it."""
    folder = cache_folder() / "downloads"
    found = {}
    for name, (version, url) in ARCHIVES.items():
        path = folder / url.rsplit("/", 1)[-1]
        package = package_in(path) if path.is_file() else None
        if package is None:
            download(url, path)
            package = Package(name, version, path, sha256_file(path))
            write_json(path.with_name(path.name + ".json"), package.facts())
        found[name] = package
    return found


def in_folder(folder: Path) -> dict[str, Package]:
    """The upstream archives lying in ``folder``."""
    found = {}
    for name, (version, url) in ARCHIVES.items():
        path = folder / url.rsplit("/", 1)[-1]
        if path.is_file():
            found[name] = Package(name, version, path, sha256_file(path))
    return found
