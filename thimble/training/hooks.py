"""Commands of the user's that a run calls when it ends: a message sent, a queue told."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from thimble.console import log
from thimble.errors import ThimbleError
from thimble.training.run import Run


@contextlib.contextmanager
def told(on_success: str | None, on_failure: str | None) -> Iterator[list[Run]]:
    """Run the body, which puts its Run into the list, and call the command that fits its end.

    The command is the user's own line for the shell (never one from a configuration, which may come
    from somebody else). It finds THIMBLE_RUN, THIMBLE_STATUS (the exit status) and THIMBLE_REASON
    in its environment. That it fails is logged, and changes nothing.
    """
    runs: list[Run] = []
    try:
        yield runs
    except BaseException as error:
        interrupted = 130 if isinstance(error, KeyboardInterrupt) else 1
        status = error.status if isinstance(error, ThimbleError) else interrupted
        call(on_failure, getattr(error, "run", None), status, str(error) or type(error).__name__)
        raise
    call(on_success, runs[0].path, 0, runs[0].status)


def call(command: str | None, run: Path | None, status: int, reason: str) -> None:
    if not command or os.environ.get("RANK", "0") != "0":
        return
    facts = {
        "THIMBLE_RUN": str(run.resolve()) if run else "",
        "THIMBLE_STATUS": str(status),
        "THIMBLE_REASON": reason,
    }
    # Standard output is for our own result; the command's goes to standard error.
    done = subprocess.run(
        command, shell=True, env={**os.environ, **facts}, stdin=subprocess.DEVNULL, stdout=2
    )
    if done.returncode:
        log.warning("the command %r ended with status %d", command, done.returncode)
