from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from thimble.conversations import sources
from thimble.errors import ConfigError, DataError, EnvironmentProblem

SLIM = "oo-labeled_correct.gpt4.sharegpt.jsonl"
LINE = b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}\n'
CONTENT = LINE * 5000


class Hub(http.server.ThreadingHTTPServer):
    """A hub that can be told to misbehave; it notes what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {SLIM: CONTENT}
        self.sha256: dict[str, str] = {}
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.break_after: list[int] = []  # for one answer each: bytes after which it ends
        self.status: int | None = None
        self.short = 0  # bytes of the end that are never sent, nor announced

    def listing(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "lfs": {"oid": self.sha256.get(name, hashlib.sha256(content).hexdigest())},
            }
            for name, content in self.files.items()
        ]


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(
            (self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if self.path.startswith("/api/datasets/Open-Orca/"):
            content = json.dumps(self.server.listing()).encode()
        elif self.server.status:
            self.send_error(self.server.status)
            return
        else:
            content = self.server.files[self.path.rsplit("/", 1)[-1]]
            content = content[: len(content) - self.server.short]
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        content = content[begin:]
        if "resolve" in self.path and self.server.break_after:
            content = content[: self.server.break_after.pop(0)]
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(sources, "PAUSE", 0.0)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_is_resumed_where_it_broke_off(hub: Hub, tmp_path: Path) -> None:
    hub.break_after = [100_000, 50_000]
    (path,) = sources.find("slimorca", str(tmp_path / "d"))
    assert path.read_bytes() == CONTENT
    assert path.name == SLIM
    ranges = [span for where, span, _ in hub.asked if "resolve" in where]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert {token for _, _, token in hub.asked} == {"Bearer secret"}
    assert [p.name for p in (tmp_path / "d").iterdir()] == [SLIM]
    asked = len(hub.asked)
    assert sources.find("SlimOrca", str(tmp_path / "d")) == [path]
    assert len(hub.asked) == asked  # the second time nothing is asked


def test_what_was_received_before_is_kept_for_the_next_call(hub: Hub, tmp_path: Path) -> None:
    hub.break_after = [1000] * 4
    with pytest.raises(EnvironmentProblem, match=r"kept and will be resumed.*dataset\.data_dir"):
        sources.find("slimorca", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [f"{SLIM}.part"]
    sources.find("slimorca", str(tmp_path))
    assert (tmp_path / SLIM).read_bytes() == CONTENT
    assert hub.asked[-1][1] == "bytes=4000-"


def test_a_length_that_is_a_lie_is_noticed(hub: Hub, tmp_path: Path) -> None:
    hub.short = 7  # the server announces what it sends; only the checksum knows better
    with pytest.raises(DataError, match="sha256"):
        sources.find("slimorca", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_without_a_checksum_the_size_has_to_be_right(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [{key: e[key] for key in ("path", "size")} for e in hub.listing()]
    monkeypatch.setattr(hub, "listing", lambda: plain)
    hub.short = 7
    with pytest.raises(DataError, match="bytes instead of"):
        sources.find("slimorca", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "HF_TOKEN"), (403, "terms"), (404, "HF_ENDPOINT")]
)
def test_a_refusal_says_what_to_do_and_is_not_repeated(
    hub: Hub, tmp_path: Path, status: int, advice: str
) -> None:
    hub.status = status
    with pytest.raises(EnvironmentProblem, match=advice):
        sources.find("slimorca", str(tmp_path))
    assert len([where for where, *_ in hub.asked if "resolve" in where]) == 1
    assert not list(tmp_path.iterdir())


def test_a_busy_server_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.status = 503
    with pytest.raises(EnvironmentProblem, match="503"):
        sources.find("slimorca", str(tmp_path))
    assert len([where for where, *_ in hub.asked if "resolve" in where]) == 4


def test_the_token_is_not_sent_on_to_where_the_hub_redirects(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Redirecting(Answer):
        def do_GET(self) -> None:
            if "resolve" in self.path:
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{hub.server_address[1]}/cdn/{SLIM}")
                self.end_headers()
            else:
                super().do_GET()

    hub.RequestHandlerClass = Redirecting
    sources.find("slimorca", str(tmp_path))
    assert [token for where, _, token in hub.asked if "cdn" in where] == [None]


def test_zst_and_several_files(hub: Hub, tmp_path: Path) -> None:
    hub.files = {f"{SLIM}.zst": zstandard.compress(CONTENT)}
    (path,) = sources.find("slimorca", str(tmp_path))
    assert sources.count(path) == 5000
    names = sources.KNOWN["openorca"].files
    hub.files = dict.fromkeys(names, b"x")
    found = sources.find("openorca", str(tmp_path / "open"))
    assert [p.name for p in found] == list(names)
    found[1].unlink()
    hub.asked.clear()
    assert sources.find("openorca", str(tmp_path / "open")) == found
    assert [where.rsplit("/", 1)[-1] for where, *_ in hub.asked if "resolve" in where] == [names[1]]


def test_offline_says_where_to_put_the_file(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"HF_HUB_OFFLINE.*{SLIM}") as error:
        sources.find("slimorca", str(tmp_path))
    assert str(tmp_path) in str(error.value)
    (tmp_path / SLIM).write_bytes(CONTENT)
    assert sources.find("slimorca", str(tmp_path)) == [tmp_path / SLIM]


def test_ones_own_files_in_the_folder_count_before_the_hub(tmp_path: Path) -> None:
    (tmp_path / "SlimOrca.jsonl").write_bytes(CONTENT)
    assert sources.find("slimorca", str(tmp_path)) == [tmp_path / "SlimOrca.jsonl"]
    (tmp_path / "conversations.jsonl").write_bytes(CONTENT)  # a corpus
    assert sources.find("slimorca", str(tmp_path)) == [tmp_path / "conversations.jsonl"]


def test_what_a_set_is_called() -> None:
    assert sources.stem([Path(f"x/{SLIM}.zst")]) == "slimorca"
    assert (
        sources.stem([Path("data/corpus/os_kernel-quick/conversations.jsonl")]) == "os_kernel-quick"
    )
    assert sources.stem([Path("x/SlimOrca.jsonl.gz")]) == "SlimOrca"
    assert sources.stem([Path("x/a.parquet"), Path("x/b.parquet")]) == "x"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean slimorca"):
        sources.find("slimroca")
    with pytest.raises(ConfigError, match="Leave one of them out"):
        sources.find(str(tmp_path), str(tmp_path))
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match="another kind"):
        sources.find(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="holds no conversations"):
        sources.find(str(tmp_path))
    (tmp_path / "manifest.json").touch()
    with pytest.raises(DataError, match="made without conversations"):
        sources.find(str(tmp_path))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_truncated_file_is_refused(tmp_path: Path, ending: str) -> None:
    import gzip

    whole = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending](CONTENT)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(whole)
    assert sources.count(path) == 5000
    path.write_bytes(whole[: len(whole) // 2])
    if ending:
        with pytest.raises(DataError, match="truncated or damaged"):
            sources.count(path)


@pytest.mark.parametrize("parquet", [True, False])
def test_chunks_give_the_chosen_records_with_their_numbers(tmp_path: Path, parquet: bool) -> None:
    if parquet:
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(
            pyarrow.table({"n": list(range(1, 1201))}), path, row_group_size=70
        )
        read = [{"n": n} for n in range(1, 1201)]
    else:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"".join(b"%d\n" % n for n in range(1, 1201)))
        read = [b"%d\n" % n for n in range(1, 1201)]
    assert sources.count(path) == 1200
    chosen = np.random.default_rng(0).random(1200) < 0.3
    found = list(sources.chunks(path, chosen, size=100))
    assert [passed for passed, _ in found] == [100] * 12
    records = [record for _, chunk in found for record in chunk]
    assert records == [(i + 1, read[i]) for i in np.flatnonzero(chosen)]


def test_a_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not at all")
    with pytest.raises(DataError, match="truncated or damaged"):
        sources.count(path)
