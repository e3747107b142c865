"""How far a phase has come, while it runs: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# A log file wants to show that a long phase lives, not every answer of it.
PLAIN_INTERVAL_S = 15.0

Update = Callable[[int, int], None]


class Display(Protocol):
    """Shows phases; ``phase`` gives the function that takes (done, total) while the block runs."""

    def phase(self, title: str) -> AbstractContextManager[Update]: ...


def open_display(console: Console) -> Display:
    """Bars where somebody watches, lines where a file records."""
    return BarDisplay(console) if console.is_terminal else LineDisplay(console, time.monotonic)


class BarDisplay:
    """One bar per running phase; they vanish when the phase ends, and what is printed meanwhile appears above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: Progress | None = None

    @contextmanager
    def phase(self, title: str) -> Generator[Update]:
        """Show a bar for ``title``, pulsing until a total is known."""
        with self._progress() as progress:
            task = progress.add_task(title, total=None, count="")

            def update(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total, count=f"{done:,}/{total:,}")

            try:
                yield update
            finally:
                progress.remove_task(task)

    @contextmanager
    def _progress(self) -> Generator[Progress]:
        """The bars' common display, which belongs to the outermost phase."""
        if self._running is not None:
            yield self._running
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            self._running = progress
            try:
                yield progress
            finally:
                self._running = None


class LineDisplay:
    """A line at most every ``PLAIN_INTERVAL_S`` seconds of a phase that reports progress."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock

    @contextmanager
    def phase(self, title: str) -> Generator[Update]:
        """Say nothing of a phase that ends soon."""
        begun = last = self._clock()

        def update(done: int, total: int) -> None:
            nonlocal last
            now = self._clock()
            if now - last >= PLAIN_INTERVAL_S:
                last = now
                self._console.print(f"{title}: {done:,}/{total:,} after {now - begun:.0f} s", soft_wrap=True)

        yield update
