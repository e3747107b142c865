"""Two processes that make the same folder at a time: the second is refused, and touches nothing of the first's."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chatlearn.checkpoint.durable import open_staging, staging_of
from chatlearn.errors import ConfigError


@contextmanager
def sole_staging(final: Path) -> Generator[Path]:
    """As ``open_staging``; raises ``ConfigError`` where another process is preparing ``final``.

    The lock is the kernel's, on the staging folder itself: it goes with its process, and no file of it stays behind.
    On a file system without locks nobody is noticed.
    """
    with ExitStack() as stack:
        if staging_of(final).exists():  # Left behind or in use: who holds the lock may remove it.
            stack.enter_context(_locked(final))
        staging = open_staging(final)
        stack.enter_context(_locked(final))
        yield staging


@contextmanager
def _locked(final: Path) -> Generator[None]:
    staging = staging_of(final)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        if not _is_ours(staging, descriptor):
            raise ConfigError(f"{final}: another process is writing there; wait for its end, or choose another folder")
        yield
    finally:
        os.close(descriptor)


def _is_ours(staging: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # This file system knows no locks.
        return True
    return os.path.samestat(os.fstat(descriptor), staging.stat())  # else it was replaced before we had the lock
