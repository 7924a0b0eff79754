"""``thimble doctor`` says what is there and what is amiss, and breaks over nothing."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from thimble import api, doctor
from thimble.cli import main


@pytest.fixture
def server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_it_is_text_to_paste_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch: " in text
    assert "precision=auto is " in text
    assert "\x1b" not in text
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == __import__("torch").__version__
    assert facts["problems"] == []


def test_the_hub_is_asked_and_its_absence_is_no_failure(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert api.doctor().facts["network"] == {"hub": "127.0.0.1 can be reached"}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert "cannot be reached" in api.doctor().facts["network"]["hub"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not asked" in api.doctor().facts["network"]["hub"]


def test_a_broken_extra_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extra.py").write_text("raise OSError('libcuda.so.1: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    whole = types.ModuleType("whole_extra")
    whole.__version__ = "2.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "whole_extra", whole)
    monkeypatch.setattr(
        doctor, "EXTRAS", {"a": ("whole_extra", "absent_extra"), "b": ("broken_extra",)}
    )
    extras = api.doctor().facts["extras"]
    assert extras["a"] == "whole_extra 2.1, absent_extra not installed"
    assert extras["b"] == "broken_extra does not load: OSError: libcuda.so.1: no such file"


def test_little_room_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert any("Only 1.0 GiB are free" in problem for problem in api.doctor().problems)
