"""When the driver's lookout speaks: a clock of the test's own, and a driver that waits for nobody."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from chatlearn.cluster import lookout
from chatlearn.cluster.lookout import Lookout, Station
from chatlearn.cluster.waiting import WAITING

TIMEOUT_S = 60.0


Happenings = dict[float, Callable[["Clock"], None]]
Watch = Callable[[Happenings, float], list[tuple[float, str]]]


class Clock(Event):
    """Time passes only where the lookout waits; at given seconds something happens, and then the end comes."""

    def __init__(self, happenings: Happenings, end_s: float) -> None:
        super().__init__()
        self.begun = self.now = time.monotonic()
        self.happenings = dict(happenings)
        self.end_s = end_s

    @property
    def passed(self) -> float:
        return self.now - self.begun

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0.0
        for due in [second for second in self.happenings if second <= self.passed]:
            self.happenings.pop(due)(self)
        if self.passed >= self.end_s:
            self.set()
        return self.is_set()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Watch:
    """Keeps a lookout; what it said, with the second."""

    def keep(happenings: Happenings, end_s: float) -> list[tuple[float, str]]:
        clock = Clock(happenings, end_s)
        clocks = SimpleNamespace(monotonic=lambda: clock.now, time=time.time, strftime=time.strftime)
        monkeypatch.setattr(lookout, "time", clocks)
        monkeypatch.setattr("chatlearn.cluster.waiting.time", clocks)
        monkeypatch.setattr("chatlearn.cluster.presence.time", clocks)
        monkeypatch.setattr(WAITING, "last_progress", clock.now)
        said: list[tuple[float, str]] = []
        post = Station(TIMEOUT_S, tuple, tmp_path / "report.txt", lambda text: said.append((clock.passed, text)))
        Lookout(post, clock).keep()
        return said

    return keep


def test_it_speaks_after_the_time_and_again_after_the_time(watch: Watch) -> None:
    said = watch({}, 2.5 * TIMEOUT_S)
    assert [TIMEOUT_S <= passed <= TIMEOUT_S + 10 for passed, _ in said[:1]] == [True]
    assert [2 * TIMEOUT_S <= passed <= 2 * TIMEOUT_S + 20 for passed, _ in said[1:]] == [True]
    assert "the driver is at work itself" in said[0][1]
    assert "nothing was finished for 65 s" in said[0][1]
    assert "nothing was finished for 130 s" in said[1][1]


def progress(clock: Clock) -> None:
    WAITING.progress()


def fall_asleep(clock: Clock) -> None:
    """The time goes on, as it does for a laptop that sleeps or a driver behind Ctrl-Z."""
    clock.now += 10 * TIMEOUT_S


def test_progress_begins_the_time_anew_and_after_a_report_it_is_told(watch: Watch) -> None:
    assert watch({0.9 * TIMEOUT_S: progress}, 1.8 * TIMEOUT_S) == []
    said = watch({1.5 * TIMEOUT_S: progress}, 2 * TIMEOUT_S)
    assert ["nothing was finished for 65 s" in said[0][1], "the run goes on:" in said[1][1]] == [True, True]
    assert len(said) == 2


def test_a_driver_that_was_stopped_itself_blames_nobody(watch: Watch) -> None:
    assert watch({10.0: fall_asleep}, 10 + 10.9 * TIMEOUT_S) == []
    assert len(watch({10.0: fall_asleep}, 10 + 11.6 * TIMEOUT_S)) == 1
