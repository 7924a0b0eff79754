from __future__ import annotations

from typing import Any

import pytest

from tests.helpers_cli import Command
from thimble import api


@pytest.fixture
def thimble_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Every function of the API replaced by one that notes how it was called."""
    made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def note(name: str) -> Any:
        return lambda *args, **options: made.append((name, args, options))

    for name in (
        *("build_corpus", "build_tokens", "build_conversations", "plan", "train", "accept"),
        *("download_data", "pack_tokens"),
        *("generate", "chat"),
        *("evaluate", "report", "doctor", "quickstart", "sweep", "quantize"),
        "compare",
        *("build_sudoku", "build_maze", "build_arc"),
        *("cache_teacher", "finetune_teacher"),
        *("export_gguf", "export_onnx", "export_transformers", "export_bin"),
    ):
        monkeypatch.setattr(api, name, note(name))
    return made
