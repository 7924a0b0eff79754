"""What holds for every test: no network beyond this machine, and nothing of the user's settings."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
for name in ("DISABLE_COMPILE", "LLAMA_TOKENIZER", "THIMBLE_HOME", "COLUMNS", "PYTHONUNBUFFERED"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """The command sets up the log for its process; the next test finds it as it was."""
    log = logging.getLogger("thimble")
    before = (log.handlers[:], log.propagate, log.level)
    yield
    log.handlers[:], log.propagate = before[0], before[1]
    log.setLevel(before[2])


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines; a server that the test itself runs stays reachable."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(101, f"tests reach no network, and this one tried {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
