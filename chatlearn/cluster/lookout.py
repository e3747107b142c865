"""The driver's lookout: when nothing was finished for long, it says who does what and who waits for whom.

It is a thread, so that it sees the driver's own loop stand still too. It only tells; the run goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from chatlearn.cluster.fanout import Member
from chatlearn.cluster.presence import Observer
from chatlearn.cluster.waiting import WAITING
from chatlearn.observability.standstill import DRIVER, Name, Presence
from chatlearn.observability.standstill_report import long_report, short_report
from chatlearn.observability.whereabouts import Whereabouts, read_whereabouts, whereabouts_path
from chatlearn.observability.whole_file import replacing

LOOK_EVERY_S = 1.0
SILENCE_S = 5.0  # Whoever writes every two seconds and said nothing new for so long does not run.
ASLEEP_S = 30.0  # A look that comes so late tells that the driver itself was stopped: then nothing is known yet.


@dataclass(frozen=True)
class Station:
    """What a lookout is told: how long a standstill is, whom to look at, where to write and to whom to speak."""

    timeout_s: float
    members: Callable[[], Sequence[Member]]
    report_path: Path
    say: Callable[[str], None]


@contextmanager
def looking_out(station: Station) -> Generator[None]:
    """Keep a lookout inside; none where the time is zero."""
    if station.timeout_s == 0:
        yield
        return
    WAITING.progress()  # That there is somebody to look at is some.
    end = threading.Event()
    lookout = Lookout(station, end)
    thread = threading.Thread(target=lookout.keep, name="lookout", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(SILENCE_S)  # It may be about to speak; a file system that hangs shall not hold the run.


class Lookout:
    """Counts the time since something was finished, in the whole run."""

    def __init__(self, station: Station, end: threading.Event) -> None:
        self._station = station
        self._end = end
        self._driver = Observer(*DRIVER)
        self._since = time.monotonic()
        self._reported: float | None = None

    def keep(self) -> None:
        """Look now and then, until the end."""
        looked = time.monotonic()
        while not self._end.wait(LOOK_EVERY_S):
            if time.monotonic() - looked > ASLEEP_S:
                self._since = time.monotonic()
            self._look()
            looked = time.monotonic()

    def _look(self) -> None:
        if self._reported is not None and WAITING.last_progress > self._reported:
            self._station.say("the run goes on: something was finished again")
            self._reported = None
        if time.monotonic() - max(self._since, WAITING.last_progress) < self._station.timeout_s:
            return
        presences = self._presences()
        quiet_s = min(
            time.monotonic() - WAITING.last_progress,
            *(one.words.quiet_s + (one.silent_s or 0) for one in presences if one.words is not None),
        )
        if (
            quiet_s < self._station.timeout_s
        ):  # Somebody else was given an answer, in a transfer of weights for example.
            self._since = time.monotonic() - quiet_s
        elif not self._end.is_set():
            self._report(presences, quiet_s)
            self._since = self._reported = time.monotonic()

    def _report(self, presences: Sequence[Presence], quiet_s: float) -> None:
        with (
            suppress(OSError),
            replacing(self._station.report_path) as file,
        ):  # A full disk: the console has the essence.
            file.write(long_report(presences, quiet_s, time.strftime("%Y-%m-%d %H:%M:%S")))
        self._station.say(short_report(presences, quiet_s, str(self._station.report_path)))

    def _presences(self) -> list[Presence]:
        """Everybody, looked at twice: who said nothing new in between does not run."""
        members = self._station.members()
        before = _words(members)
        self._end.wait(SILENCE_S)
        after = _words(members)
        driver = self._driver.look()
        presences = [Presence(*DRIVER, driver.host, driver.pid, driver, None, None)]
        for member in members:
            words = after.get((member.role, member.rank))
            is_silent = words is not None and words == before.get((member.role, member.rank))
            silent_s = time.time() - words.written_s if words is not None and is_silent else None
            state = _state(member.pid) if member.host == driver.host else None
            presences.append(Presence(member.role, member.rank, member.host, member.pid, words, silent_s, state))
        known = {one.name for one in presences}
        strangers = [wait for wait in driver.waits if (wait.role, wait.rank) not in known]  # They have not arrived yet.
        presences += [Presence(wait.role, wait.rank, "", 0, None, None, None) for wait in strangers]
        return presences


def _words(members: Sequence[Member]) -> dict[Name, Whereabouts]:
    """What every member's file says; a file that a predecessor left says nothing of its successor."""
    found: dict[Name, Whereabouts] = {}
    for member in members:
        words = read_whereabouts(whereabouts_path(member.log_file))
        if words is not None and words.pid == member.pid:
            found[(member.role, member.rank)] = words
    return found


def _state(pid: int) -> str:
    """The system's word for what a process of this host does."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"
