"""One run per output directory, whoever else tries and however a run ends: real processes, real locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatlearn.checkpoint import run_lock
from chatlearn.checkpoint.run_lock import LOCK_NAME, hold_directory, require_free
from chatlearn.errors import ConfigError, RunError

# Holds the lock, tells so, starts a child of its own, and waits to be ended.
HOLD = """
import subprocess, sys
from pathlib import Path
from chatlearn.checkpoint.run_lock import hold_directory
with hold_directory(Path(sys.argv[1]), print):
    quiet = subprocess.DEVNULL
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(program, stdin=quiet, stdout=quiet, close_fds=False)  # it gets what can be inherited
    print("held", child.pid, flush=True)
    sys.stdin.read()
    child.kill()
"""
# Many turns in which a counter is read, and written back a moment later: two at a time would lose counts.
COUNT = """
import sys, time
from pathlib import Path
from chatlearn.checkpoint.run_lock import hold_directory
from chatlearn.errors import ConfigError
folder, turns = Path(sys.argv[1]), 0
while turns < 10:
    try:
        with hold_directory(folder, print):
            counter = folder / "counter"
            before = int(counter.read_text()) if counter.exists() else 0
            time.sleep(0.01)
            counter.write_text(str(before + 1))
            turns += 1
    except ConfigError:
        continue
"""


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def enter(folder: Path) -> list[str]:
    """Hold the directory for an instant; returns what was said."""
    said: list[str] = []
    with hold_directory(folder, said.append) as hold:
        hold.require_ours()
        written = json.loads((folder / LOCK_NAME).read_text())
        assert (written["host"], written["pid"]) == (socket.gethostname(), os.getpid())
    return said


def look(folder: Path) -> list[str]:
    """Ask whether the directory is free; returns what was said."""
    said: list[str] = []
    require_free(folder, said.append)
    return said


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life and watching for them, in the same relation as ever, ten times as fast."""
    for name in ("SIGN_EVERY_S", "WATCH_S", "LOOK_EVERY_S"):
        monkeypatch.setattr(run_lock, name, getattr(run_lock, name) / 10)


def test_a_second_run_is_refused_with_host_and_pid_of_the_first_one(tmp_path: Path) -> None:
    first = start(HOLD, tmp_path / "run")
    assert heard(first).startswith("held")
    for attempt in (enter, look):
        with pytest.raises(ConfigError, match=rf"pid {first.pid} on host {socket.gethostname()} is writing there"):
            attempt(tmp_path / "run")
    first.communicate("")
    assert (tmp_path / "run" / LOCK_NAME).read_text() == ""
    assert look(tmp_path / "run") == []
    assert enter(tmp_path / "run") == []


def test_what_a_killed_run_left_is_taken_over_at_once_though_its_child_lives(tmp_path: Path) -> None:
    first = start(HOLD, tmp_path)
    child = int(heard(first).split()[1])
    first.kill()
    first.communicate()
    os.kill(child, 0)  # raises where it is gone
    assert "is gone" not in "".join(look(tmp_path)), "who only looks takes nothing over"
    (said,) = enter(tmp_path)
    os.kill(child, signal.SIGKILL)
    assert f"the run with pid {first.pid} on host {socket.gethostname()} is gone" in said
    assert enter(tmp_path) == []


def test_only_one_of_several_that_race_is_inside(tmp_path: Path) -> None:
    racers = [start(COUNT, tmp_path) for _ in range(3)]
    for racer in racers:
        said, _ = racer.communicate(timeout=120)
        assert racer.returncode == 0
        assert said == "", "everybody tidied up"
    assert (tmp_path / "counter").read_text() == "30"


ELSEWHERE = {"host": "elsewhere", "pid": 7, "run": "of another host"}


@pytest.mark.usefixtures("quick")
def test_a_run_of_another_host_is_believed_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    """As where the file system carries no lock from there: the lock can be had, and the file is touched."""
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps(ELSEWHERE))
    with run_lock.Hold(path, run_lock.Holder(**ELSEWHERE)).giving_signs():
        for attempt in (enter, look):
            with pytest.raises(ConfigError, match=r"pid 7 on host elsewhere is writing there"):
                attempt(tmp_path)
    assert json.loads(path.read_text()) == ELSEWHERE
    (watching,) = look(tmp_path)
    assert "watching for 3 s whether it gives a sign of life" in watching
    watching, taken = enter(tmp_path)
    assert "the run with pid 7 on host elsewhere is gone" in taken


@pytest.mark.usefixtures("quick")
def test_a_run_that_was_taken_over_while_it_stood_still_ends(tmp_path: Path) -> None:
    """Its file names another run by the time it wakes up; it must notice before it goes on."""
    with hold_directory(tmp_path, print) as hold:
        (tmp_path / LOCK_NAME).unlink()
        time.sleep(2 * run_lock.SIGN_EVERY_S)
        hold.require_ours()  # Nobody is named.
        (tmp_path / LOCK_NAME).write_text(json.dumps(ELSEWHERE))
        time.sleep(3 * run_lock.SIGN_EVERY_S)
        with pytest.raises(RunError, match="the run with pid 7 on host elsewhere has taken this directory over"):
            hold.require_ours()
    assert json.loads((tmp_path / LOCK_NAME).read_text()) == ELSEWHERE, "the other one's name stays"


def test_a_run_is_asked_no_more_often_than_it_gives_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked many times a second, and the file may lie on a slow disk."""
    with hold_directory(tmp_path, print) as hold:
        monkeypatch.setattr(run_lock, "_read", pytest.fail)
        hold.require_ours()
        monkeypatch.undo()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "elsewh', '{"host": 1, "pid": "x"}', "\x00\xff"])
def test_a_torn_file_names_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    assert enter(tmp_path) == []


def test_a_look_writes_nothing(tmp_path: Path) -> None:
    assert look(tmp_path / "none") == []
    assert list(tmp_path.iterdir()) == []


def test_several_may_look_at_once_and_a_file_that_is_open_for_reading_is_locked_as_network_disks_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / LOCK_NAME, fcntl.flock
    path.write_text("")

    def flock_of_a_network_disk(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", flock_of_a_network_disk)
    with path.open() as other:
        flock(other, fcntl.LOCK_SH)  # another look, in the middle
        assert look(tmp_path) == []
    assert enter(tmp_path) == []


@pytest.mark.usefixtures("quick")
def test_who_watches_without_writing_keeps_nobody_from_starting(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps(ELSEWHERE))

    def start_meanwhile(_watching: str) -> None:
        with path.open() as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where the lock is taken

    require_free(tmp_path, start_meanwhile)


def test_an_error_inside_gives_the_directory_back(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hold_directory(tmp_path, print):
        raise KeyboardInterrupt
    assert enter(tmp_path) == []


@pytest.mark.usefixtures("quick")
def test_a_file_system_without_locks_is_said_and_signs_of_life_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    said: list[str] = []
    with hold_directory(tmp_path, said.append), pytest.raises(ConfigError, match=rf"pid {os.getpid()} on host"):
        enter(tmp_path)
    assert "this file system has no locks" in said[0]
