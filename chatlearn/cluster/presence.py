"""How a process knows where it is, and the small thread in every actor that keeps writing it down.

The thread needs Python's lock for some tenths of a millisecond now and then. In a process that is stopped, or whose
lock a library holds, it cannot write; that its file grows old says so.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import ray

from chatlearn.cluster.waiting import WAITING
from chatlearn.observability.whereabouts import Frame, Stack, Thread, Whereabouts, write_whereabouts

TELL_EVERY_S = 2.0
DEEPEST = 200  # frames; a recursion without end shall not make a file without end

_RAY = str(Path(ray.__file__).parent)


class Observer:
    """Looks at the process it lives in; remembers since when the main thread has been where it is."""

    def __init__(self, role: str, rank: int) -> None:
        self._role = role
        self._rank = rank
        self._host = socket.gethostname()
        self._stack: Stack = ()
        self._since = time.monotonic()

    def look(self) -> Whereabouts:
        """What this process does now."""
        now = time.monotonic()
        # Python documents it, its underscore notwithstanding.
        frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
        stacks = {thread: _stack(frame) for thread, frame in frames.items()}
        del frames  # or what the methods hold would live until the next look
        stack = stacks.pop(threading.main_thread().ident or 0, ())  # Ray runs an actor's methods in the main thread.
        if stack != self._stack:
            self._stack, self._since = stack, now
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks.pop(threading.get_ident(), None)
        return Whereabouts(
            role=self._role,
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            written_s=time.time(),
            call=call_of(stack),
            has_peers=WAITING.has_peers,
            same_stack_s=round(now - self._since, 1),
            quiet_s=round(now - WAITING.last_progress, 1),
            waits=WAITING.waits(),
            stack=stack,
            threads=tuple(Thread(names.get(thread, str(thread)), other) for thread, other in stacks.items()),
        )


def call_of(stack: Stack) -> str | None:
    """What an actor was asked to do: the outermost function that is not Ray's; there is none while it is idle."""
    return next((frame.function for frame in stack if not frame.path.startswith(_RAY)), None)


def tell_whereabouts(path: Path, observer: Observer) -> None:
    """Start the thread that writes ``path``; it ends with the process, and keeps it from nothing."""
    threading.Thread(target=_tell, args=(path, observer.look), name="whereabouts", daemon=True).start()


def _tell(path: Path, look: Callable[[], Whereabouts]) -> None:
    while True:
        with suppress(OSError):  # A full disk may have room again.
            write_whereabouts(path, look())
        time.sleep(TELL_EVERY_S)


def _stack(frame: FrameType | None) -> Stack:
    frames: list[Frame] = []
    while frame is not None and len(frames) < DEEPEST:
        frames.append(Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname))
        frame = frame.f_back
    return tuple(reversed(frames))
