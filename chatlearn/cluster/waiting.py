"""What this process waits for, and when something of it last came: one register for the whole process.

Whoever waits for actors tells it; the thread that writes this process's whereabouts reads it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol

from chatlearn.observability.whereabouts import Wait


class Debtor(Protocol):
    """Who owes an answer; a ``Member`` is one."""

    @property
    def role(self) -> str: ...

    @property
    def rank(self) -> int: ...


class Waiting:
    """Knows whom this process waits for, from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._owed: list[tuple[Mapping[Any, Debtor], float]] = []
        self.has_peers = False
        self.last_progress = time.monotonic()

    @contextmanager
    def on(self, owed: Mapping[Any, Debtor]) -> Generator[None]:
        """Inside, whoever is a value of ``owed`` is waited for; the waiter takes out of it who has answered."""
        entry = (owed, time.monotonic())
        with self._lock:
            self._owed.append(entry)
        try:
            yield
        finally:
            with self._lock:
                self._owed = [other for other in self._owed if other is not entry]

    def progress(self) -> None:
        """Something was finished: an answer is there that brings the run on."""
        self.last_progress = time.monotonic()

    def join_peers(self) -> None:
        """From now on the ranks of this process's role meet in collectives."""
        self.has_peers = True

    def waits(self) -> tuple[Wait, ...]:
        """Who owes an answer now; the longest wait first, and nobody twice."""
        now = time.monotonic()
        with self._lock:
            # A list of a dictionary's values is made in one piece, whatever the thread does that changes it.
            owed = [(list(debtors.values()), since) for debtors, since in self._owed]
        longest: dict[tuple[str, int], float] = {}
        for debtors, since in owed:
            for debtor in debtors:
                longest.setdefault((debtor.role, debtor.rank), now - since)
        return tuple(Wait(role, rank, round(for_s, 1)) for (role, rank), for_s in longest.items())


WAITING = Waiting()
