"""What a training run does when it is asked to end: SIGINT, SIGTERM."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from thimble.console import log
from thimble.errors import Interrupted

Handler = Callable[[int, FrameType | None], Any]
REPEAT = 2.0  # seconds


class StopRequest:
    """The first SIGINT or SIGTERM asks the loop to save and leave; a second SIGINT breaks.

    ``several``: under torchrun Ctrl-C comes twice, from the terminal and from torchrun.
    """

    def __init__(self, *, several: bool) -> None:
        self.several = several
        self.time = math.inf

    def __bool__(self) -> bool:
        return self.time < math.inf

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self:
            repeated = self.several and time.monotonic() - self.time < REPEAT
            if number == signal.SIGINT and not repeated:
                raise KeyboardInterrupt
            return
        self.time = time.monotonic()
        log.warning("%s: saving after this step.", signal.Signals(number).name)

    def listening(self) -> contextlib.AbstractContextManager[None]:
        return handling(self.ask, signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def handling(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """The body runs with this handler; the former ones come back, unless another took its place."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a signal handler can only be set in the main thread; the caller has its own
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, former)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """For the time before the first step, when there is nothing to save."""
    raise Interrupted("Stopped before the first step; the same command begins anew.")


def ignore_sigterm() -> None:
    """For whoever ends already and is about to say why."""

    def ignore(number: int, frame: FrameType | None) -> None:
        log.debug("SIGTERM: ending already")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ignore)  # not SIG_IGN, which commands started now inherit
