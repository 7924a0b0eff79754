from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_cli import Command
from thimble import api
from thimble.corpora.sources import upstream
from thimble.errors import DataError, EnvironmentProblem
from thimble.puzzles import tables


class Hub(http.server.ThreadingHTTPServer):
    folder: Path
    breaks = 0  # how many answers still break off in the middle
    paths: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        prefix, _, name = self.path.rpartition("/")
        if prefix != "/datasets/owner/name/resolve/main":
            self.send_error(404)
            return
        wanted = self.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").rstrip("-") or 0)
        content = (self.server.folder / name).read_bytes()[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.breaks:
            self.server.breaks -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("THIMBLE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(upstream.time, "sleep", lambda seconds: None)
    with Hub(("127.0.0.1", 0), Handler) as running:
        running.paths, running.folder = [], tmp_path / "hub"
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_address[1]}/")
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def test_a_data_set_of_the_hub_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    api.build_sudoku(hub.folder, generate=4, seed=2, workers=1)
    hub.breaks = 1
    for name in ("a", "b"):
        api.build_sudoku(tmp_path / name, source="owner/name", workers=1)
    assert [path.rpartition("/")[2] for path in hub.paths] == ["train.csv", "train.csv", "test.csv"]
    local = api.build_sudoku(tmp_path / "c", source=hub.folder, workers=1)
    name = Path("train/all__inputs.npy")
    assert (tmp_path / "a" / name).read_bytes() == (local / name).read_bytes()


def test_a_data_set_that_is_not_there_leaves_advice_and_nothing_else(
    hub: Hub, tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentProblem, match=r"404.*--from FOLDER, or make.*--generate 1000"):
        api.build_maze(tmp_path / "a", source="owner/other")
    assert not (tmp_path / "a").exists()
    assert not list((tmp_path / "cache").rglob("*.csv"))


def test_a_folder_that_is_not_there() -> None:
    for source in ("nowhere", "./a/b", "/no/where", "a/b/c"):
        with pytest.raises(DataError, match=f"There is no folder {source}"):
            tables.source_files(source)


def test_the_command(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = Command(capfd)
    words = ["puzzles", "build", "sudoku", "--generate", "3", "--size", "4", "--workers", "1"]
    answer = command(*words, "-o", str(tmp_path / "a"), "--json")
    assert answer.status == 0, answer.err
    assert json.loads(answer.out) == {"path": str(tmp_path / "a")}
    looked = json.loads(command("inspect", str(tmp_path / "a"), "--json").out)
    assert (looked["kind"], looked["counts"]["train"]["groups"]) == ("puzzles", 3)
    assert command(*words, "--seed", "1", "-o", str(tmp_path / "a")).status == 2
    answer = command("puzzles", "build", "maze", "--from", str(tmp_path / "none"))
    assert answer.status == 5
    assert "There is no folder" in answer.err
    answer = command("puzzles", "build", "arc", "--input-file-prefix", "p", "training")
    assert answer.status == 2
    assert "What is training?" in answer.err
