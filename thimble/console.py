"""What a person sees while long work runs: progress with rate and time left, and plain notes.

Everything here goes to standard error; standard output is for results alone. Library code calls
``progress`` and ``log``; only the command line decides how much of it is shown.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator

log = logging.getLogger("thimble")

quiet = False


def setup(verbosity: int) -> None:
    """``verbosity``: -1 quiet (warnings only), 0 normal, 1 and more: details."""
    global quiet
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    quiet = verbosity < 0 or not first
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter())
    log.handlers[:] = [handler]
    log.propagate = False
    level = logging.WARNING if quiet else logging.DEBUG if verbosity else logging.INFO
    log.setLevel(level if first else logging.ERROR)


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Keep back what packages log while they are imported, such as what they did not find here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        return f"warning: {message}" if record.levelno >= logging.WARNING else message


@contextlib.contextmanager
def progress(what: str, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Show the progress of ``what``; yields ``advance(amount)``.

    On a terminal one live bar with rate and time left; otherwise a plain line every ten seconds
    and one at the end, so that a log file stays readable.
    """
    if quiet:
        yield lambda amount: None
        return
    if not sys.stderr.isatty():
        yield from _plain(what, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task):
            return Text(f"{_number(task.speed or 0.0)} {unit}/s")

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%" if total else "{task.completed:,.0f}"),
        Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def _plain(what: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
    started = last = time.monotonic()
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= 10:
            last = now
            rate = done / (now - started)
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            of = f" of {_number(total)}" if total else ""
            log.info("%s: %s%s %s, %s/s%s", what, _number(done), of, unit, _number(rate), left)

    yield advance
    seconds = time.monotonic() - started
    if seconds >= 1:
        rate = done / seconds
        log.info("%s: %s %s in %.1f s (%s/s)", what, _number(done), unit, seconds, _number(rate))


def _number(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.1f}{suffix}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
