"""A stream of tensors that is made in a thread while its consumer is busy, within a bound of bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Condition

from torch import Tensor

AHEAD_BYTES = 128 * 1024 * 1024  # enough to even out large and small tensors, little beside a file of weights

Stream = Generator[tuple[str, Tensor]]


def ahead(stream: Stream, max_bytes: int = AHEAD_BYTES) -> Stream:
    """The items of ``stream`` in their order, and its error when it comes to that.

    Of what is finished at most ``max_bytes`` wait, or one tensor; one more is being made and one is used.
    """
    waiting = _Waiting(max_bytes)
    with closing(stream), ThreadPoolExecutor(max_workers=1) as thread:
        made = thread.submit(_make, stream, waiting)
        try:
            yield from waiting.items()
            made.result()
        finally:
            waiting.close()


def _make(stream: Stream, waiting: _Waiting) -> None:
    try:
        for item in stream:
            if not waiting.put(item):
                return
    finally:
        waiting.put_end()


class _Waiting:
    """What one thread has made and another has not used yet."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._items: deque[tuple[str, Tensor]] = deque()
        self._ended = False
        self._closed = False
        self._changed = Condition()

    def put(self, item: tuple[str, Tensor]) -> bool:
        """Wait for room, then add; false where nobody will take it any more."""
        size = item[1].nbytes
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._items or self._num_bytes + size <= self._max_bytes)
            self._items.append(item)
            self._num_bytes += size
            self._changed.notify_all()
            return not self._closed

    def put_end(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Take one after the other until the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended)
                if not self._items:
                    return
                item = self._items.popleft()
                self._num_bytes -= item[1].nbytes
                self._changed.notify_all()
            yield item

    def close(self) -> None:
        """Nobody takes any more."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
