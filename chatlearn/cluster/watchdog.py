"""A small process that outlives the driver by seconds and leaves no process of a local run behind.

Ray's own agents live on for minutes when the driver is killed with SIGKILL, and so would a grandchild that nobody
waits for. The watchdog keeps a list of the driver's descendants; when the driver is gone, whatever the reason, it
gives them a moment to leave by themselves and then ends exactly those processes, and no others: psutil compares start
times, so that a process number that was used again is never hit.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

import psutil

POLL_S = 1.0
GRACE_S = 4.0  # Actors notice a dead driver within a second or two and leave; nothing of ours may live after ten.
TERMINATE_S = 2.0


def start_watchdog(driver_pid: int) -> None:
    """Start the watchdog in a session of its own, so that neither Ctrl-C nor a closed terminal reaches it."""
    subprocess.Popen(
        [sys.executable, "-m", "chatlearn.cluster.watchdog", str(driver_pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def watch(driver: psutil.Process) -> None:
    """Follow the driver's descendants until it ends, then see them out."""
    descendants: set[psutil.Process] = set()
    while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
        try:
            descendants = {child for child in descendants if child.is_running()}
            descendants.update(driver.children(recursive=True))
            driver.wait(POLL_S)
        except psutil.TimeoutExpired:
            continue
        except psutil.NoSuchProcess:
            break
    see_out([child for child in descendants if child.pid != psutil.Process().pid])


def see_out(processes: Sequence[psutil.Process]) -> None:
    """Wait, ask, then insist."""
    _, alive = psutil.wait_procs(processes, timeout=GRACE_S)
    for process in alive:
        _quietly(process.terminate)
    _, alive = psutil.wait_procs(alive, timeout=TERMINATE_S)
    for process in alive:
        _quietly(process.kill)


def _quietly(act: Callable[[], None]) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return  # It left between the look and the deed.


if __name__ == "__main__":
    watch(psutil.Process(int(sys.argv[1])))
