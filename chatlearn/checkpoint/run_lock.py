"""One run per output directory: a file that says who writes there, locked for as long as that process lives.

The lock is the kernel's (``flock``), so it goes with its process, however that ends, and is inherited by no program
that the process starts. What stands in the file is for people, and for other hosts: network file systems do not carry
``flock`` from one host to another everywhere, so a name of another host counts even where the lock can be had.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from chatlearn.errors import ConfigError

LOCK_NAME = "run.lock"
# A dry run that looks holds the lock for an instant; who wants it for good asks again for so long before giving up.
PATIENCE_S = 1.0
ASK_AGAIN_S = 0.05


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names."""

    host: str
    pid: int


@contextmanager
def hold_directory(directory: Path, say: Callable[[str], None]) -> Generator[None]:
    """Be the only run that writes into ``directory``, which is made where it is missing.

    ``say`` is told in one line where a run that died left its name. Raises ``ConfigError`` that names host and process
    of the run that is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_NAME
    with _opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        if not _is_lockable(path, descriptor, say):
            yield
            return
        holder = _holder(descriptor)
        if holder is not None:
            _require_same_host(path, holder)
            say(f"{path}: the run with pid {holder.pid} is gone and did not end well; this one takes its place")
        _write(descriptor, json.dumps(asdict(Holder(socket.gethostname(), os.getpid()))) + "\n")
        try:
            yield
        finally:
            _write(descriptor, "")


def require_free(directory: Path) -> None:
    """Raise what ``hold_directory`` would raise; writes nothing, for a dry run that disturbs nobody."""
    path = directory / LOCK_NAME
    if not path.is_file() or not os.access(path, os.R_OK):
        return
    with _opened(path, os.O_RDONLY) as descriptor:
        if _is_lockable(path, descriptor, lambda _: None):
            holder = _holder(descriptor)
            if holder is not None:
                _require_same_host(path, holder)


@contextmanager
def _opened(path: Path, flags: int) -> Generator[int]:
    """Closing the descriptor, which Python hands on to no other program, gives the lock back."""
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_lockable(path: Path, descriptor: int, say: Callable[[str], None]) -> bool:
    """Take the lock; False, and said, where the file system knows none. Raises ``ConfigError`` where it is taken."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise ConfigError(_taken(path, _holder(descriptor))) from None
            time.sleep(ASK_AGAIN_S)
        except OSError as error:
            say(
                f"{path}: this file system has no locks ({error.strerror}); see to it yourself that no other run writes"
            )
            return False
        else:
            return True


def _taken(path: Path, holder: Holder | None) -> str:
    who = "another run" if holder is None else f"the run with pid {holder.pid} on host {holder.host}"
    return (
        f"runtime_args.output_dir={path.parent}: {who} is writing there ({path.name} is locked); choose another "
        "output_dir, or end that run first"
    )


def _require_same_host(path: Path, holder: Holder) -> None:
    if holder.host != socket.gethostname():
        raise ConfigError(
            f"runtime_args.output_dir={path.parent}: a run with pid {holder.pid} on host {holder.host} writes there, "
            f"and from this host, {socket.gethostname()}, nobody can see whether it lives; choose another output_dir, "
            f"or, if that process is gone, delete {path}"
        )


def _holder(descriptor: int) -> Holder | None:
    """Who is named; nobody where the file is empty, or torn because its writer died."""
    try:
        found: object = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    document = cast("dict[str, object]", found)  # JSON's keys are always text
    host, pid = document.get("host"), document.get("pid")
    return Holder(host, pid) if isinstance(host, str) and isinstance(pid, int) else None


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    os.fsync(descriptor)
