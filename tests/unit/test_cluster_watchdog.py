"""Nobody outlives a driver that was killed: neither whom the watchdog has seen, nor whom it has not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
GONE_WITHIN_S = 30.0  # Its promise is ten; a busy machine may take its time with the watchdog's own start.
SLEEPER = [sys.executable, "-c", "import time; time.sleep(120)"]
# Beside a child, a process whose parent ends at once, so that no look at the driver's descendants can find it.
DRIVER = f"""
import os, subprocess, time
from chatlearn.cluster.watchdog import start_watchdog
start_watchdog(os.getpid())
child = subprocess.Popen({SLEEPER!r}, stdout=subprocess.DEVNULL)
if os.fork() == 0:
    print(child.pid, os.posix_spawn({SLEEPER[0]!r}, {SLEEPER!r}, os.environ), flush=True)
    os._exit(0)
os.wait()
time.sleep(120)
"""


def test_children_and_orphans_of_a_killed_driver_are_seen_out_and_nobody_else() -> None:
    """Killed at once, before the watchdog can have looked, or even started."""
    stranger = subprocess.Popen(SLEEPER)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    ours = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
    driver.kill()
    driver.stdout.close()
    driver.wait()
    _, alive = psutil.wait_procs(ours, timeout=GONE_WITHIN_S)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    is_stranger_well = stranger.poll() is None
    for process in [*alive, stranger]:
        process.kill()
    stranger.wait()
    assert len(ours) == 2
    assert alive == []
    assert is_stranger_well
