"""A hub of the test: data sets at commits, files in parts, and whatever misbehaviour is wanted."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Hub(http.server.ThreadingHTTPServer):
    """``datasets[repository][revision]``: name -> bytes. ``asked``: path, range, authorization."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.datasets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.licences: dict[str, Any] = {}
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.refused: dict[str, int] = {}  # repository -> status
        self.busy: list[int] = []  # statuses of the next answers that are files
        self.break_after: list[int] = []  # bytes after which one of them ends
        self.stop_after: int | None = None  # files are not sent any more after so many answers
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repository: str, files: dict[str, bytes], revision: str = "main") -> None:
        """Files at ``revision``, and at the commit that this makes."""
        revisions = self.datasets.setdefault(repository, {})
        revisions[revision] = revisions[commit_of(files)] = files

    def files_asked(self) -> list[str]:
        return [path for path, *_ in self.asked if "/resolve/" in path]


def commit_of(files: dict[str, bytes]) -> str:
    content = repr(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()))
    return hashlib.sha1(content.encode()).hexdigest()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        hub = self.server
        path = urllib.parse.urlsplit(self.path).path
        hub.asked.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/revision/([^/]+)", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if match is None:
            self.send_error(404)
            return
        repository, revision = match[1], urllib.parse.unquote(match[2])
        found = hub.datasets.get(repository, {}).get(revision)
        if status := hub.refused.get(repository):
            self.send_error(status)
        elif found is None:
            self.send_error(404)
        elif api:
            self.send(200, json.dumps(self.info(repository, found)).encode())
        elif hub.busy:
            self.send_error(hub.busy.pop(0))
        elif hub.stop_after is not None and hub.sent >= hub.stop_after:
            self.send_error(403)
        else:
            hub.sent += 1
            content = found[urllib.parse.unquote(match[3])]
            begin, end = map(int, (self.headers.get("Range") or "bytes=0-0")[6:].split("-"))
            self.send(206, content[begin : end + 1], file=True)

    def info(self, repository: str, files: dict[str, bytes]) -> dict[str, Any]:
        card = {"license": self.server.licences[repository]} if self.server.licences else None
        return {
            "sha": commit_of(files),
            "siblings": [{"rfilename": name, "size": len(data)} for name, data in files.items()],
            "cardData": card,
        }

    def send(self, status: int, content: bytes, *, file: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if file and self.server.break_after:
            content = content[: self.server.break_after.pop(0)]
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def running() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
