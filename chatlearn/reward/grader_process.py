"""Processes that run reward functions: both ends. A process that is stuck or dead costs one answer and is replaced.

Model output is judged here because it can keep any function busy for ever, whatever the function's own precautions.
Each process has a socket of its own and nothing in common with the others, no lock and no queue, so that killing one
at any moment harms no other. They are started as plain interpreters: ``multiprocessing`` would import the program's
main module again in each of them, and with it Ray or an engine.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from numbers import Real
from typing import cast

from chatlearn.config.resolve import imported
from chatlearn.errors import ConfigError
from chatlearn.records import Completion, Prompt, Score

RewardFn = Callable[[Prompt, Completion], float | Score]

STDERR = 2
CLOSE_TIMEOUT_S = 2.0
PR_SET_PDEATHSIG = 1  # of prctl(2)

# What an interpreter is told to do; search path, socket and parent follow as arguments.
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from chatlearn.reward.grader_process import serve; serve(*map(json.loads, sys.argv[2:]))"
)


@dataclass(frozen=True, eq=False)
class Task:
    """One answer to judge. ``function`` names the reward function as ``package.module:function``."""

    function: str
    prompt: Prompt
    completion: Completion


@dataclass(frozen=True)
class Ready:
    """The process has imported its reward functions; ``problem`` says why it could not."""

    problem: str | None


class GraderProcess:
    """The driver's end of one process."""

    def __init__(self, functions: Sequence[str], preloaded: Sequence[str], start_timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        arguments = [sys.path, theirs.fileno(), os.getpid(), functions, preloaded]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, *map(json.dumps, arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=STDERR,  # what a reward function prints must not mix with the program's own output
            )
        self.connection = Connection(ours.detach())
        self.is_ready = False
        self.task: int | None = None
        self.expires = time.monotonic() + start_timeout_s  # when we stop waiting for its next message

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def is_free(self) -> bool:
        """Whether it is alive and waits for a task."""
        return self.is_ready and self.task is None and self._process.poll() is None

    def begin(self, number: int, task: Task, deadline_s: float) -> bool:
        """Hand over a task that the driver knows as ``number``; false where the process died just now."""
        try:
            self.connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            return False
        self.task, self.expires = number, time.monotonic() + deadline_s
        return True

    def receive(self) -> Ready | Score | None:
        """Its answer; ``None`` where it died instead of answering."""
        try:
            message = cast("Ready | Score", self.connection.recv())  # serve() sends nothing else
        except (EOFError, ConnectionResetError):
            return None
        if isinstance(message, Ready):
            self.is_ready = True
        self.task, self.expires = None, float("inf")
        return message

    def reap(self) -> int:
        """Bury a process that has hung up, and return its exit status; negative is the number of a signal."""
        self.connection.close()
        try:
            return self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """End the process at once and return its exit status."""
        self.connection.close()
        self._process.kill()
        return self._process.wait()

    def close(self) -> None:
        """Let an idle process end by itself, and kill one that does not."""
        if not self.is_ready or self.task is not None:
            self.kill()
        else:
            self.reap()


def serve(descriptor: int, parent: int, functions: Sequence[str], preloaded: Sequence[str]) -> None:
    """Judge answers until the driver closes the socket or dies: the other process's whole life.

    ``preloaded`` are modules that the functions import when they are called; imported now, they take no answer's time.
    """
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the driver decides
    os.set_inheritable(descriptor, False)
    logging.disable(logging.WARNING)  # parsers complain about every odd answer
    connection = Connection(descriptor)
    try:
        loaded = {name: import_function(name) for name in functions}
        for module_name in preloaded:
            importlib.import_module(module_name)
    except ConfigError as error:
        connection.send(Ready(str(error)))
        return
    # The driver may close its end at any moment, which is how this loop ends.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(Ready(None))
        while True:
            task = cast("Task", connection.recv())  # GraderProcess.begin sends nothing else
            connection.send(_judge(loaded[task.function], task))


def _judge(function: RewardFn, task: Task) -> Score:
    try:
        return checked_score(function(task.prompt, task.completion))
    except Exception as error:  # noqa: BLE001 - the border of the process: an error becomes part of the score
        return Score(0.0, error=f"{type(error).__name__}: {error}"[:500])


def checked_score(result: object) -> Score:
    """What a reward function returned as a score that is fit to train on; anything else is an error of the function."""
    if isinstance(result, Real):  # numpy's numbers too
        result = Score(float(result))
    if not isinstance(result, Score):
        raise TypeError(f"a reward function must return a number or a Score, not {type(result).__name__}")
    parts = {name: float(number) for name, number in result.parts.items()}
    infinite = [name for name, number in {"value": result.value, **parts}.items() if not math.isfinite(number)]
    if infinite:
        raise ValueError(f"a reward must be finite; its {' and '.join(infinite)} is not")
    return Score(float(result.value), parts, result.error)


def import_function(name: str) -> RewardFn:
    """Import ``package.module:function``."""
    function = imported(name, "models.reward.function")
    return cast("RewardFn", function)  # its signature shows when it is called; a wrong one is reported as an error


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even while it is deep inside a computation.

    Elsewhere than on Linux it ends when it next looks at its socket.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit()
