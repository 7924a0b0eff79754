"""Data sets of the hub as JSONL: nothing twice, nothing left out, nothing misread."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests import helpers_hub
from tests.helpers_cli import Command
from tests.helpers_hub import Hub
from thimble.console import log
from thimble.corpora import download as module
from thimble.corpora import plans
from thimble.corpora.download import LEDGER, download
from thimble.corpora.plans import Part, Plan, Source
from thimble.corpora.sources import hub as access
from thimble.corpora.sources import streams
from thimble.errors import ConfigError, DataError, EnvironmentProblem

LONG = "which is long enough to be kept by whoever counts its characters"


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"question": f"Whät is {i}, {LONG}?", "answer": f"{i}.", "more": {"n": i}}
        for i in range(start, start + count)
    ]


def parquet(records: list[dict[str, Any]], group: int = 7) -> bytes:
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, file, row_group_size=group)
    return file.getvalue()


def jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def indented(records: list[Any]) -> bytes:
    return json.dumps(records, indent=2, ensure_ascii=False).encode()


FILES = {
    "parquet": {"a-0.parquet": parquet(rows(20)), "a-1.parquet": parquet(rows(13, 20))},
    "jsonl": {"a-0.jsonl": jsonl(rows(20)), "a-1.jsonl": jsonl(rows(13, 20))},
    "json": {"a-0.json": indented(rows(20)), "a-1.json": indented(rows(13, 20))},
}
TEXTS = [f"Question: {r['question']}\n\nAnswer: {r['answer']}" for r in rows(33)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with helpers_hub.running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(access, "PAUSE", 0.0)
        monkeypatch.setattr(access, "BLOCK", 900)
        monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(module, "TOGETHER", 3)
        monkeypatch.setattr(log, "propagate", True)
        yield server


def plan(monkeypatch: pytest.MonkeyPatch, cap: int = 1000, **sources: Source) -> None:
    monkeypatch.setattr(module, "SOURCES", sources)
    monkeypatch.setattr(module, "PLANS", {"poc": Plan(dict.fromkeys(sources, cap))})


def source(repository: str = "us/qa", files: str = "a-*", **more: Any) -> Source:
    parts = (Part("Question", "question"), Part("Answer", "answer"))
    return Source(repository, "factual_qa", "mit", files, more.pop("parts", parts), **more)


def samples(output: Path, name: str = "qa") -> list[dict[str, Any]]:
    path = output / "factual_qa" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", FILES)
def test_every_record_becomes_a_sample_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub.add("us/qa", FILES[kind])
    plan(monkeypatch, qa=source())
    done = download("poc", output=tmp_path)
    found = samples(tmp_path)
    assert [sample["text"] for sample in found] == TEXTS
    assert len({sample["id"] for sample in found}) == 33
    assert found[0] | {"text": "", "id": ""} == {
        "text": "",
        "id": "",
        "source": "us/qa",
        "category": "factual_qa",
        "license": "mit",
    }
    assert done.rows[0]["state"] == "complete"
    assert {token for *_, token in hub.asked} == {"Bearer secret"}
    assert sorted(p.name for p in (tmp_path / "factual_qa").iterdir()) == ["qa.jsonl"]
    asked = len(hub.asked)
    download("poc", output=tmp_path)
    assert len(hub.asked) == asked  # the second time nothing is asked


def test_of_wide_parquet_only_the_columns_that_are_read_travel(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    draw = random.Random(0)
    wide = [row | {"html": draw.randbytes(50_000).hex()} for row in rows(20)]
    content = parquet(wide, group=10)
    hub.add("us/qa", {"a-0.parquet": content})
    plan(monkeypatch, qa=source())
    opened: list[access.RemoteFile] = []
    real = access.Snapshot.open
    monkeypatch.setattr(
        access.Snapshot, "open", lambda self, name: opened.append(real(self, name)) or opened[-1]
    )
    download("poc", output=tmp_path)
    assert [sample["text"] for sample in samples(tmp_path)] == TEXTS[:20]
    assert sum(file.received for file in opened) < 0.05 * len(content)


def test_a_cap_counts_samples_and_a_higher_one_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("us/qa", FILES["parquet"])
    for cap, expected in ((8, 8), (22, 22), (1000, 33)):
        plan(monkeypatch, cap=cap, qa=source())
        assert download("poc", output=tmp_path).rows[0]["samples"] == expected
        assert [sample["text"] for sample in samples(tmp_path)] == TEXTS[:expected]
    plan(monkeypatch, cap=8, qa=source())
    assert download("poc", output=tmp_path, status=True).rows[0]["state"] == "complete"


# ----------------------------------------------------------------------------- interrupted, resumed


class Killed(BaseException):
    """What ends a process in the middle, whatever it may be."""


@pytest.mark.parametrize("kind", FILES)
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub.add("us/qa", FILES[kind])
    plan(monkeypatch, qa=source())
    download("poc", output=tmp_path / "whole")
    expected = (tmp_path / "whole/factual_qa/qa.jsonl").read_bytes()
    real = module._write_ledger
    for when in (1, 2, 5, 3):
        written = 0

        def write(output: Path, ledger: Any, when: int = when) -> None:
            nonlocal written
            written += 1
            if written == when:  # the samples are on disk, the ledger is not
                raise Killed
            real(output, ledger)

        monkeypatch.setattr(module, "_write_ledger", write)
        with pytest.raises(Killed):
            download("poc", output=tmp_path / "cut")
        assert not (tmp_path / "cut/factual_qa/qa.jsonl").exists()
    monkeypatch.setattr(module, "_write_ledger", real)
    download("poc", output=tmp_path / "cut")
    assert (tmp_path / "cut/factual_qa/qa.jsonl").read_bytes() == expected


def test_it_goes_on_at_the_commit_it_began_with(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("us/qa", FILES["jsonl"])
    plan(monkeypatch, qa=source())
    hub.stop_after = 1 + len(FILES["jsonl"]["a-0.jsonl"]) // 900
    with pytest.raises(EnvironmentProblem, match="refused"):
        download("poc", output=tmp_path)
    state = download("poc", output=tmp_path, status=True).rows[0]
    assert state["samples"] == 20
    hub.stop_after = None
    hub.add("us/qa", {"a-0.jsonl": jsonl(rows(40, 500))})  # main moves on
    download("poc", output=tmp_path)
    assert [sample["text"] for sample in samples(tmp_path)] == TEXTS


@pytest.mark.parametrize("kind", FILES)
def test_refused_in_the_middle_it_goes_on_there_with_a_new_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub.add("us/qa", FILES[kind])
    plan(monkeypatch, qa=source())
    monkeypatch.setattr(module, "SAVE_SECONDS", 3600.0)
    monkeypatch.setattr(streams, "BufferedReader", lambda file, size: io.BufferedReader(file, 100))
    hub.stop_after = 2
    with pytest.raises(EnvironmentProblem, match="HF_TOKEN"):
        download("poc", output=tmp_path)
    hub.stop_after = None
    download("poc", output=tmp_path)
    assert [sample["text"] for sample in samples(tmp_path)] == TEXTS


def test_ctrl_c_leaves_what_is_whole_and_says_how_to_go_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("us/qa", FILES["jsonl"])
    hub.add("us/other", FILES["jsonl"])
    plan(monkeypatch, qa=source(), other=source("us/other"))
    real = access.Snapshot.open

    def stop(self: access.Snapshot, name: str) -> access.RemoteFile:
        if self.repository == "us/other" and name == "a-1.jsonl":
            raise KeyboardInterrupt
        return real(self, name)

    monkeypatch.setattr(access.Snapshot, "open", stop)
    with pytest.raises(KeyboardInterrupt):
        download("poc", output=tmp_path)
    assert "goes on from here" in caplog.text
    assert len(samples(tmp_path)) == 33
    monkeypatch.setattr(access.Snapshot, "open", real)
    hub.asked.clear()
    download("poc", output=tmp_path)
    assert [sample["text"] for sample in samples(tmp_path, "other")] == TEXTS
    assert not [path for path in hub.files_asked() if "a-0" in path]  # it was read before


@pytest.mark.parametrize("kind", FILES)
def test_a_connection_that_breaks_off_is_taken_up_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub.add("us/qa", FILES[kind])
    plan(monkeypatch, qa=source())
    hub.busy, hub.break_after = [503, 429], [5, 900, 0, 100]
    download("poc", output=tmp_path)
    assert [sample["text"] for sample in samples(tmp_path)] == TEXTS


def test_storage_elsewhere_gets_the_range_and_not_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("us/qa", FILES["parquet"])
    hub.redirects = True
    plan(monkeypatch, qa=source())
    download("poc", output=tmp_path)
    assert [sample["text"] for sample in samples(tmp_path)] == TEXTS
    storage = [(span, token) for path, span, token in hub.asked if path.startswith("/storage/")]
    assert storage
    assert all(span and token is None for span, token in storage)


def test_two_at_once_in_one_folder_are_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thimble.artifacts import locked

    hub.add("us/qa", FILES["jsonl"])
    plan(monkeypatch, qa=source())
    with locked(tmp_path, "x"), pytest.raises(EnvironmentProblem, match="is writing to"):
        download("poc", output=tmp_path)


# ------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.parquet": parquet([{"query": LONG, "response": LONG}])}, "no field question, answer"),
        ({"a.jsonl": jsonl([{"query": LONG, "response": LONG}])}, "no field question"),
        ({"a.json": indented([{"query": LONG, "response": LONG}])}, "no field question"),
        ({"a.jsonl": jsonl([{"question": {"text": LONG}, "answer": "a"}])}, "question is a dict"),
        ({"a.jsonl": jsonl([[1, 2]])}, "a record is a list"),
        ({"a.jsonl": b'{"question": "a\n'}, "is no JSON"),
        ({"a.json": b'[{"question": "a"'}, "is no JSON"),
        ({"a.json": b'{"data": []}'}, "not a JSON list"),
        ({"a.json": b"[" + jsonl(rows(1))}, "ends before its list does"),
        ({"a.parquet": b"PAR1 and no more than that"}, "cannot be read"),
        ({"a.jsonl": jsonl([{"question": " ", "answer": ""}])}, "gave no sample"),
        ({"b.csv": b""}, r"has no file a.* any more; it has b\.csv"),
    ],
)
def test_a_data_set_that_does_not_fit_is_an_error_and_makes_no_file(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    message: str,
) -> None:
    hub.add("us/qa", files)
    plan(monkeypatch, qa=source(files="a*"))
    with pytest.raises(DataError, match=message) as caught:
        download("poc", output=tmp_path)
    if "no field" in message:
        assert "query, response" in str(caught.value)  # what there is instead
    assert not list(tmp_path.rglob("*.jsonl"))
    row = download("poc", output=tmp_path, status=True).rows[0]
    assert row["state"].startswith("failed: ")
    hub.add("us/qa", FILES["jsonl"])  # mended
    plan(monkeypatch, qa=source())
    download("poc", output=tmp_path)
    assert [sample["text"] for sample in samples(tmp_path)] == TEXTS


def test_a_few_bad_records_are_counted_and_many_are_an_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [{"question": LONG}]
    hub.add("us/qa", {"a-0.jsonl": jsonl(rows(200) + bad)})
    plan(monkeypatch, qa=source())
    row = download("poc", output=tmp_path).rows[0]
    assert (row["samples"], row["left_out"]["refused"]) == (200, 1)
    hub.add("us/qa", {"a-0.jsonl": jsonl(rows(200) + 3 * bad)})
    with pytest.raises(DataError, match="3 of 203 records"):
        download("poc", output=tmp_path / "many")


def test_what_is_empty_or_short_is_counted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = [
        {"question": LONG, "answer": ""},
        {"question": "Why?", "answer": "So."},
        {"question": None, "answer": "x"},
    ]
    hub.add("us/qa", {"a-0.jsonl": jsonl(rows(5) + odd)})
    plan(monkeypatch, qa=source())
    row = download("poc", output=tmp_path).rows[0]
    assert row["samples"] == 5
    assert row["left_out"] == {"empty": 2, "short": 1, "refused": 0}


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "HF_TOKEN"), (403, "terms"), (404, "HF_ENDPOINT")]
)
def test_a_gated_data_set_does_not_keep_the_others_back(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, advice: str
) -> None:
    hub.add("us/qa", FILES["jsonl"])
    hub.refused["us/gated"] = status
    plan(monkeypatch, gated=source("us/gated"), qa=source())
    with pytest.raises(EnvironmentProblem, match=advice):
        download("poc", output=tmp_path)
    assert len(samples(tmp_path)) == 33
    rows = {row["name"]: row["state"] for row in download("poc", output=tmp_path, status=True).rows}
    assert rows["qa"] == "complete"
    assert advice in rows["gated"]


def test_a_hub_that_is_away_ends_the_command_at_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    plan(monkeypatch, qa=source(), other=source("us/other"))
    with pytest.raises(EnvironmentProblem, match="tokens pack"):
        download("poc", output=tmp_path)


def test_offline_says_what_to_do_and_what_is_there_still_counts(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("us/qa", FILES["jsonl"])
    plan(monkeypatch, qa=source())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EnvironmentProblem, match="HF_HUB_OFFLINE"):
        download("poc", output=tmp_path)
    assert download("poc", output=tmp_path, dry_run=True).rows[0]["state"] == "not here"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    download("poc", output=tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert download("poc", output=tmp_path).rows[0]["state"] == "complete"


def test_the_converted_branch_serves_where_main_has_no_such_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("us/qa", {"script.py": b""})
    hub.add("us/qa", {"python/train/0000.parquet": parquet(rows(9))}, plans.CONVERTED)
    plan(monkeypatch, qa=source(converted="python/*train/*.parquet"))
    download("poc", output=tmp_path)
    assert [sample["text"] for sample in samples(tmp_path)] == TEXTS[:9]


# ---------------------------------------------------------------------------------------- the table


def test_a_dry_run_shows_licences_and_sizes_and_writes_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("us/qa", FILES["jsonl"])
    hub.licences["us/qa"] = ["cc-by-nc-4.0"]
    hub.gated.add("us/qa")
    plan(monkeypatch, qa=source(), lost=source("us/lost"), gone=source("us/gone", gone="burnt"))
    found = download("poc", output=tmp_path / "d", dry_run=True)
    qa, lost, gone = found.rows
    assert (qa["licence"], qa["hub_licence"]) == ("mit", "cc-by-nc-4.0")
    assert qa["hub_bytes"] == sum(map(len, FILES["jsonl"].values()))
    assert "HF_TOKEN" in qa["state"]
    assert "404" in lost["state"]
    assert gone["state"] == "cannot be had: burnt"
    assert not (tmp_path / "d").exists()
    assert not hub.files_asked()
    plan(monkeypatch, qa=source())
    download("poc", output=tmp_path / "d")
    assert "the plan names the licence mit, the hub cc-by-nc-4.0" in caplog.text
    assert {sample["license"] for sample in samples(tmp_path / "d")} == {"cc-by-nc-4.0"}


def test_the_table_is_shown_to_a_person(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Command(capfd)("data", "download", "--plan", "curriculum", "--status", "-o", "d")
    assert answer.status == 0
    for name, each in plans.SOURCES.items():
        if name in plans.PLANS["curriculum"].caps:
            assert f"{each.category}/{name}" in answer.out
    assert "3,000,000" in answer.out
    assert "cannot be had" in answer.out


def test_names_that_do_not_exist_are_answered_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean curriculum"):
        download("curiculum", output=tmp_path)
    with pytest.raises(ConfigError, match="Did you mean factual_qa"):
        download("curriculum", ["factual"], output=tmp_path)
    with pytest.raises(ConfigError, match="nothing of factual_qa"):
        download("poc", ["factual_qa"], output=tmp_path)


def test_a_ledger_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text('{"metamath": {"nonsense": 1}}')
    with pytest.raises(DataError, match=LEDGER):
        download("poc", output=tmp_path, status=True)
