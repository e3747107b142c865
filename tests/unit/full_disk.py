"""A disk that takes no more, for a moment: the kernel refuses to let any file of this process grow further."""

from __future__ import annotations

import resource
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def no_file_beyond(num_bytes: int) -> Generator[None]:
    """Writing past so many bytes of a file is an ``OSError`` inside, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
