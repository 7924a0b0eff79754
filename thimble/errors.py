"""Every way thimble can refuse, and the exit status each one carries.

A message says what was wrong, where, and what to do; the command line prints it as it is and keeps
the traceback for ``-v`` and for the run's ``error.txt``.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class ThimbleError(Exception):
    """Base of all errors a user can cause or mend. ``status`` is the process's exit status."""

    status = 1


class ConfigError(ThimbleError):
    """The command or the configuration is wrong: unknown key, wrong type, impossible shape."""

    status = 2


class NotAccepted(ThimbleError):
    """The work was done, and what came out did not pass the gate."""

    status = 3


class GuardStop(ThimbleError):
    """A guard ended a training run; the last good checkpoint is untouched.

    ``event`` is what the run's record says of it: kind, step, reason and windows.
    """

    status = 4

    def __init__(self, message: str, run: Path, event: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.run, self.event = run, event


class DataError(ThimbleError):
    """Input data or an artefact on disk is missing, damaged or does not fit."""

    status = 5


class EnvironmentProblem(ThimbleError):
    """The machine is in the way: device, disk, network, a missing program or extra."""

    status = 6


class Interrupted(ThimbleError):
    """Stopped by a signal after saving; the same command with ``--resume`` goes on."""

    status = 75


DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def disk_problem(error: OSError, where: object) -> EnvironmentProblem:
    """The error to raise for an ``OSError`` that happened while writing below ``where``."""
    if error.errno in DISK_FULL:
        return EnvironmentProblem(
            f"The disk is full: could not write {where}. "
            "Nothing under a final name was changed. Free some space and run the command again."
        )
    return EnvironmentProblem(f"Could not write {where}: {error.strerror or error}.")


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that ``word`` was most likely meant to be, or None when nothing is close."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return close[0]
    # A dotted key is often right in its last part and wrong in the group before it.
    tail = word.rsplit(".", 1)[-1]
    same_tail = [choice for choice in choices if choice.rsplit(".", 1)[-1] == tail]
    if same_tail:
        return same_tail[0]
    by_tail = {choice.rsplit(".", 1)[-1]: choice for choice in choices}
    close = difflib.get_close_matches(tail, list(by_tail), n=1, cutoff=0.6)
    return by_tail[close[0]] if close else None
