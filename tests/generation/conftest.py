from __future__ import annotations

import pytest

from tests.helpers_cli import Command
from thimble.console import log


@pytest.fixture
def thimble_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pytest hear the log, also after a test that ran the command."""
    monkeypatch.setattr(log, "propagate", True)
