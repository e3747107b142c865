"""One run per output directory: a file that says who writes there, locked for as long as that process lives.

The lock is the kernel's (``flock``), so it goes with its process, however that ends, and is inherited by no program
that the process starts. Network file systems do not carry it from one host to another everywhere. So the file also
names its run, and the run touches it every few seconds: whoever finds the name of another host, as in a container that
was started anew, watches the file for a while before taking it over. A run that finds that it was taken over, because
it was stopped for longer than that, ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from chatlearn.errors import ConfigError, RunError

LOCK_NAME = "run.lock"
# A dry run that looks holds the lock for an instant; who wants it for good asks again for so long before giving up.
PATIENCE_S = 1.0
ASK_AGAIN_S = 0.05
# Signs of life are given so often that whoever watches sees several.
SIGN_EVERY_S = 5.0
WATCH_S = 30.0
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names, and the run, which no other run has ever been called."""

    host: str
    pid: int
    run: str = ""


class Hold:
    """Being the run that a lock file names: gives signs of life, and notices when another run is named."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path = path
        self._holder = holder
        self._signed_s = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)

    @contextmanager
    def giving_signs(self) -> Generator[Hold]:
        """Touch the file inside, in a thread of its own, so that long work is no silence."""
        self._thread.start()
        try:
            yield self
        finally:
            self._end.set()
            self._thread.join()

    def require_ours(self) -> None:
        """Raise ``RunError`` when another run has taken the directory; looks only when the last sign is old.

        The last sign is as young as a process that was not stopped, so that nothing is written after a long sleep
        before it is known whose directory it is.
        """
        if time.monotonic() - self._signed_s < 2 * SIGN_EVERY_S or self._sign():
            return
        found = _read(self._path)
        other = "another run" if found is None else f"the run with pid {found.pid} on host {found.host}"
        raise RunError(
            f"{self._path}: {other} has taken this directory over, since this one gave no sign of life for over "
            f"{WATCH_S:.0f} s; it ends and writes nothing more"
        )

    def is_ours(self) -> bool:
        """Whether no other run is named; a file that cannot be read, or is gone, names none."""
        found = _read(self._path)
        return found is None or found == self._holder

    def _keep(self) -> None:
        while not self._end.wait(SIGN_EVERY_S) and self._sign():
            pass

    def _sign(self) -> bool:
        """Touch the file unless it names another run."""
        if not self.is_ours():
            return False
        with suppress(OSError):  # A file system that hiccups ends no run.
            os.utime(self._path)
        self._signed_s = time.monotonic()
        return True


@contextmanager
def hold_directory(directory: Path, say: Callable[[str], None]) -> Generator[Hold]:
    """Be the only run that writes into ``directory``, which is made where it is missing.

    ``say`` is told in one line where a run that died left its name. Raises ``ConfigError`` that names host and process
    of the run that is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_NAME
    with _opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        is_locked = _is_lockable(path, descriptor, fcntl.LOCK_EX, say)
        holder = _holder(descriptor)
        if holder is not None:
            _require_gone(path, holder, say, is_sure=is_locked)
            say(f"{path}: {_name(holder)} is gone and did not end well; this one takes its place")
        ours = Holder(socket.gethostname(), os.getpid(), uuid.uuid4().hex)
        _write(descriptor, json.dumps(asdict(ours)) + "\n")
        with Hold(path, ours).giving_signs() as hold:
            try:
                yield hold
            finally:
                if hold.is_ours():
                    _write(descriptor, "")


def require_free(directory: Path, say: Callable[[str], None]) -> None:
    """Raise what ``hold_directory`` would raise; writes nothing, for a dry run that disturbs nobody."""
    path = directory / LOCK_NAME
    if not path.is_file() or not os.access(path, os.R_OK):
        return
    with _opened(path, os.O_RDONLY) as descriptor:
        # Shared: several may look, and network file systems refuse a lock of one's own on what is open for reading.
        is_locked = _is_lockable(path, descriptor, fcntl.LOCK_SH, say)
        holder = _holder(descriptor)
    if holder is not None:  # Who watches for half a minute does it without the lock: others may start meanwhile.
        _require_gone(path, holder, say, is_sure=is_locked)


@contextmanager
def _opened(path: Path, flags: int) -> Generator[int]:
    """Closing the descriptor, which Python hands on to no other program, gives the lock back."""
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_lockable(path: Path, descriptor: int, kind: int, say: Callable[[str], None]) -> bool:
    """Take the lock, of this kind; False, and said, where there are none. Raises ``ConfigError`` where it is taken."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise ConfigError(_taken(path, _holder(descriptor))) from None
            time.sleep(ASK_AGAIN_S)
        except OSError as error:
            say(
                f"{path}: this file system has no locks ({error.strerror}); two runs that start at the same moment "
                "would not see each other"
            )
            return False
        else:
            return True


def _taken(path: Path, holder: Holder | None) -> str:
    who = "another run" if holder is None else _name(holder)
    return (
        f"runtime_args.output_dir={path.parent}: {who} is writing there ({path.name}); choose another output_dir, "
        "or end that run first"
    )


def _name(holder: Holder) -> str:
    return f"the run with pid {holder.pid} on host {holder.host}"


def _require_gone(path: Path, holder: Holder, say: Callable[[str], None], *, is_sure: bool) -> None:
    """Raise ``ConfigError`` when the named run lives; ``is_sure``: the kernel has said that none of this host does."""
    if is_sure and holder.host == socket.gethostname():
        return
    say(f"{path} names {_name(holder)}; watching for {WATCH_S:.0f} s whether it gives a sign of life")
    before, give_up = _trace(path), time.monotonic() + WATCH_S
    while time.monotonic() < give_up:
        time.sleep(LOOK_EVERY_S)
        if _trace(path) != before:
            raise ConfigError(_taken(path, _read(path)))


def _trace(path: Path) -> tuple[int, bytes]:
    """What a sign of life changes; opened anew each time, which is when network file systems look at the server."""
    with _opened(path, os.O_RDONLY) as descriptor:
        return os.fstat(descriptor).st_mtime_ns, os.pread(descriptor, 4096, 0)


def _read(path: Path) -> Holder | None:
    """Who is named in the file, opened anew; nobody where there is none, or none that can be read now."""
    try:
        with _opened(path, os.O_RDONLY) as descriptor:
            return _holder(descriptor)
    except OSError:
        return None


def _holder(descriptor: int) -> Holder | None:
    """Who is named; nobody where the file is empty, or torn because its writer died."""
    try:
        found: object = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    document = cast("dict[str, object]", found)  # JSON's keys are always text
    host, pid, run = document.get("host"), document.get("pid"), document.get("run", "")
    if isinstance(host, str) and isinstance(pid, int) and isinstance(run, str):
        return Holder(host, pid, run)
    return None


def _write(descriptor: int, text: str) -> None:
    """Overwrite, then cut: never empty in between, which would read as nobody."""
    os.ftruncate(descriptor, os.pwrite(descriptor, text.encode(), 0))
    os.fsync(descriptor)
