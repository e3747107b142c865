"""One run as a process of its own: started, watched, killed with everything that it started."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from chatlearn.cluster.watchdog import see_out
from chatlearn.errors import RunError

POLL_S: Final = 0.2
NUM_LAST_LINES: Final = 20


@dataclass(frozen=True)
class Child:
    """A run, and the file that its messages go to."""

    process: subprocess.Popen[bytes]
    log: Path

    def finish(self) -> None:
        """Wait for its end; raises ``RunError`` with its last lines where that is not a good one."""
        status = self.process.wait()
        if status != 0:
            raise RunError(
                f"a run of the check ended with status {status}; the end of {self.log}:\n{self.last_lines()}"
            )

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that it does; raises ``RunError`` where it ends before."""
        while not condition():
            if self.process.poll() is not None:
                self.finish()
                raise RunError(f"the run was over before it could be killed ({what}); use a smaller --cut")
            time.sleep(POLL_S)

    def kill(self) -> None:
        """Kill it as ``kill -9`` does, and return when all that it started is gone too."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        see_out(family)

    def require_killed(self) -> None:
        """Raise ``RunError`` where it had come to an end by itself: then nothing was interrupted."""
        if self.process.returncode != -signal.SIGKILL:
            raise RunError("the run was over before it could be killed; use a smaller --cut, or more --episodes")

    def last_lines(self) -> str:
        """What it said at last."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-NUM_LAST_LINES:])


@contextmanager
def started(command: Sequence[str], log: Path) -> Generator[Child]:
    """Start a run whose messages go to ``log``; when the block ends, however it ends, the run has ended."""
    with log.open("wb") as file:
        child = Child(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file), log)
    try:
        yield child
    finally:
        if child.process.poll() is None:
            child.kill()
