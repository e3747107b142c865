"""A small process that outlives the driver by seconds and leaves no process of a local run behind.

Ray's own agents live on for minutes when the driver is killed with SIGKILL, and so would a grandchild that nobody
waits for. The watchdog keeps a list of the driver's descendants; when the driver is gone, whatever the reason, it
gives them a moment to leave by themselves and then ends exactly those processes, and no others: psutil compares start
times, so that a process number that was used again is never hit. What was started after the last look at the driver,
and may have lost its parent by now, is known by a variable that all of them inherit.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

from chatlearn.config.environment import mark_descendants

POLL_S = 1.0
GRACE_S = 4.0  # Actors notice a dead driver within a second or two and leave; nothing of ours may live after ten.
TERMINATE_S = 2.0


def start_watchdog(driver_pid: int) -> None:
    """Start the watchdog in a session of its own, so that neither Ctrl-C nor a closed terminal reaches it.

    What this process starts from now on is marked as the driver's.
    """
    subprocess.Popen(
        [sys.executable, "-m", "chatlearn.cluster.watchdog", str(driver_pid), mark_descendants()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def watch(driver_pid: int, mark: str) -> None:
    """Follow the driver's descendants until it ends, then see them out, and whoever else carries its mark."""
    descendants: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):  # It may be gone before the first look.
        driver = psutil.Process(driver_pid)
        while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
            descendants = {child for child in descendants if child.is_running()}
            descendants.update(driver.children(recursive=True))
            with suppress(psutil.TimeoutExpired):
                driver.wait(POLL_S)
    see_out([*descendants, *marked(mark)])


def marked(mark: str) -> list[psutil.Process]:
    """Everybody who was started with ``mark`` in the environment and still has it there.

    A process that gives itself a title may write it over its environment; until it comes to that it has been seen.
    """
    name, _, value = mark.partition("=")
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # It has just ended, or belongs to somebody else.
            if process.environ().get(name) == value:
                found.append(process)
    return found


def see_out(processes: Sequence[psutil.Process]) -> None:
    """Wait, ask, then insist; those that they started meanwhile go too."""
    _, alive = psutil.wait_procs(with_families(processes), timeout=GRACE_S)
    alive = with_families(alive)
    for process in alive:
        _quietly(process.terminate)
    _, alive = psutil.wait_procs(alive, timeout=TERMINATE_S)
    for process in with_families(alive):
        _quietly(process.kill)


def with_families(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes and all below them, as long as somebody is there to be asked; never this one."""
    found: set[psutil.Process] = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {process, *process.children(recursive=True)}
    return sorted(found - {psutil.Process()}, key=lambda process: process.pid)


def _quietly(act: Callable[[], None]) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return  # It left between the look and the deed.


if __name__ == "__main__":
    watch(int(sys.argv[1]), mark=sys.argv[2])
