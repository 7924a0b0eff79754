from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_corpora import COPYRIGHT, deb, prose, tar
from thimble.corpora.sources import archives, debian, upstream
from thimble.errors import DataError, EnvironmentProblem

# -- archives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w:xz", "w:gz", "w:bz2", "w"])
def test_files_of_archives(tmp_path: Path, mode: str) -> None:
    contents = {"a/b.txt": b"hello", "a/c.bin": os.urandom(5000)}
    ending = mode.removeprefix("w").replace(":", ".")
    path = tmp_path / f"x.tar{ending}"
    path.write_bytes(tar(contents, mode))
    assert {name: content.read() for name, content in archives.files(path)} == contents


def test_files_of_a_package_and_of_the_archive_inside(tmp_path: Path) -> None:
    inner = tar({"linux/mm/slab.c": b"/* slab */"})
    path = tmp_path / "linux-source.deb"
    path.write_bytes(deb("x", {"usr/src/linux.tar.xz": inner, "usr/share/doc/x/copyright": b"c"}))
    names = {name: content.read() for name, content in archives.files(path)}
    assert names == {"linux/mm/slab.c": b"/* slab */", "usr/share/doc/x/copyright": b"c"}
    assert debian.control(path)["Package"] == "x"


@pytest.mark.parametrize("keep", [3, 70, 150, 0.5, 0.95])
def test_truncated_packages_are_refused_by_name(tmp_path: Path, keep: float) -> None:
    whole = deb("x", {"a": os.urandom(3000)})
    path = tmp_path / "x.deb"
    path.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(DataError, match=r"x\.deb is truncated or damaged"):
        archives.unpack(path, "", tmp_path / "out", ("*",))
    assert not list((tmp_path / "out").glob("*"))  # nothing half-unpacked stays


def test_unpack_takes_what_is_wanted_and_once(tmp_path: Path) -> None:
    path = tmp_path / "x.deb"
    path.write_bytes(deb("x", {"keep/a.txt": b"a", "leave/b.txt": b"b"}))
    folder = archives.unpack(path, "1", tmp_path / "out", ("keep/*",))
    assert [p.name for p in folder.rglob("*.txt")] == ["a.txt"]
    other = archives.unpack(path, "2", tmp_path / "out", ("keep/*",))
    assert other != folder  # another content under the same name is another folder
    path.unlink()
    assert archives.unpack(path, "1", tmp_path / "out", ("keep/*",)) == folder


def test_names_outside_of_the_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar({"../evil": b"x"}, "w"))
    with pytest.raises(DataError, match="outside"):
        archives.unpack(path, "", tmp_path / "out", ("*",))
    assert not (tmp_path / "evil").exists()


# -- licences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (COPYRIGHT.decode(), "GPL-2.0-or-later"),
        (COPYRIGHT.decode() + "x", "GPL-2.0-or-later"),
        ("Format: 1\n\nFiles: *\nLicense: ISC or BSD-3-clause\n", "ISC OR BSD-3-Clause"),
        ("It is free; see /usr/share/common-licenses/GPL-2 for it.", "GPL-2.0-only"),
        ("Redistribution and use in source and binary forms", "BSD-3-Clause"),
        ("Nobody knows.", "unknown"),
    ],
)  # fmt: skip
def test_licence_of(text: str, licence: str) -> None:
    assert debian.licence_of(text) == licence


# -- apt -----------------------------------------------------------------------------------------


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt that knows two packages, kept in a folder the test may change."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("manpages", "linux-doc-6.1", "linux-doc-6.12"):
        (repository / f"{name}_1%3a2.0_all.deb").write_bytes(deb(name, {"a": b"a"}))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apt-cache").write_text(f"#!/bin/sh\nls {repository} | sed 's/_.*//'\n")
    (programs / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nshift 2\nfor p in "$@"; do\n'
        f'  cp {repository}/"$p"_* . || {{ echo "E: Failed to fetch $p" >&2; exit 100; }}\ndone\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("THIMBLE_HOME", str(tmp_path / "home"))
    return repository


PATTERNS = ["manpages", "linux-doc-[0-9.]+"]


def test_fetch_takes_the_newest_and_then_the_cache(apt: Path, tmp_path: Path) -> None:
    found = debian.fetch(PATTERNS)
    assert found["linux-doc-[0-9.]+"].name == "linux-doc-6.12"
    assert found["manpages"].version == "1:2.0"
    (apt.parent / "bin/apt-get").unlink()  # the second time nothing is asked
    assert debian.fetch(PATTERNS) == found


def test_a_damaged_download_is_fetched_again(apt: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = debian.fetch(["manpages"])["manpages"].path
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with caplog.at_level("WARNING", logger="thimble"):
        assert debian.fetch(["manpages"])["manpages"].path.read_bytes() == whole
    assert "is damaged and will be fetched again" in caplog.text


def test_failures_of_apt(apt: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="thimble"):
        assert list(debian.fetch(["manpages", "no-such"])) == ["manpages"]
    assert "apt knows no package no-such" in caplog.text
    # No network: apt's own reason is passed on, and nothing half-fetched stays.
    (apt / "linux-doc-6.12_1%3a2.0_all.deb").rename(apt / "linux-doc-6.12-")
    (apt.parent / "bin/apt-cache").write_text("#!/bin/sh\necho linux-doc-6.12\n")
    with pytest.raises(EnvironmentProblem, match=r"(?s)Failed to fetch linux-doc-6\.12.*network"):
        debian.fetch(PATTERNS)
    names = {path.name for path in (debian.cache_folder() / "downloads").iterdir()}
    assert names == {"manpages_1%3a2.0_all.deb", "manpages_1%3a2.0_all.deb.json"}


def test_apt_without_lists(apt: Path) -> None:
    (apt.parent / "bin/apt-cache").write_text("#!/bin/sh\n")
    with pytest.raises(EnvironmentProblem, match="apt-get update"):
        debian.fetch(PATTERNS)


def test_versions_sort_as_numbers() -> None:
    names = ["linux-source-6.9", "linux-source-6.12", "linux-source-5.10"]
    assert debian.newest(r"linux-source-[0-9.]+", names) == "linux-source-6.12"
    assert debian.newest("none", names) is None


# -- upstream ------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    content = prose(1, 60_000).encode()
    breaks = 0  # how many answers still break off in the middle
    requests: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.requests.append(wanted)
        if self.path == "/missing":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-") or 0)
        rest = self.server.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.server.breaks:
            self.server.breaks -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def url(server: Server, path: str = "/file") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def test_a_broken_download_is_resumed(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    path = upstream.download(url(server), tmp_path / "file", pause=0)
    assert path.read_bytes() == server.content
    assert [bool(wanted) for wanted in server.requests] == [False, True, True]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_was_received_is_kept_for_the_next_run(server: Server, tmp_path: Path) -> None:
    server.breaks = upstream.ATTEMPTS
    with pytest.raises(EnvironmentProblem, match=r"broke off after .* will be resumed"):
        upstream.download(url(server), tmp_path / "file", pause=0)
    assert not (tmp_path / "file").exists()
    assert upstream.download(url(server), tmp_path / "file").read_bytes() == server.content


def test_checksum(server: Server, tmp_path: Path) -> None:
    right = hashlib.sha256(server.content).hexdigest()
    upstream.download(url(server), tmp_path / "right", sha256=right)
    with pytest.raises(DataError, match=r"does not have the sha256.*\n.*expected"):
        upstream.download(url(server), tmp_path / "wrong", sha256="0" * 64)
    assert [p.name for p in tmp_path.iterdir()] == ["right"]


def test_missing_and_unreachable(server: Server, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="404"):
        upstream.download(url(server, "/missing"), tmp_path / "file", pause=0)
    assert len(server.requests) == 1  # a 404 is not asked for again
    with pytest.raises(EnvironmentProblem, match=r"Could not fetch .* --from FOLDER"):
        upstream.download("http://192.0.2.1/file", tmp_path / "file", pause=0)
