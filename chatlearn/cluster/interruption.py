"""Ctrl-C: the first one asks the loop to stop where nothing is lost, the second one leaves at once."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The user asked to stop, and the loop is at a place where it can."""


class Interruption:
    """Remembers whether somebody pressed Ctrl-C (or sent SIGTERM, as schedulers do)."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise ``Interrupted`` when it was requested; called while waiting for work that may be thrown away."""
        if self.requested:
            raise Interrupted

    def note(self, signal_number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def listening(self) -> Generator[None]:
        """Take over SIGINT and SIGTERM inside; outside they mean what they meant before."""
        before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
