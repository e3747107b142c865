"""Keeps some grader processes busy, and replaces those that are stuck or dead."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from multiprocessing.connection import wait

from chatlearn.errors import ConfigError, RunError
from chatlearn.records import Score
from chatlearn.reward.grader_process import GraderProcess, Ready, Task

START_TIMEOUT_S = 300.0  # importing a reward function, on a machine that starts everything else as well
MAX_FAILED_STARTS = 3  # in a row; the next would fail as well
MAX_DEATHS = 2  # a process may die for reasons that are not the answer's, the kernel's lack of memory for one


class GraderPool:
    """``num_processes`` processes that know ``functions``. Use it from one thread, and close it."""

    def __init__(
        self, functions: Sequence[str], preloaded: Sequence[str], deadline_s: float, num_processes: int
    ) -> None:
        self._functions = functions
        self._preloaded = preloaded
        self._deadline_s = deadline_s
        self._failed_starts = 0
        self._processes = [self._launch() for _ in range(num_processes)]

    @property
    def pids(self) -> tuple[int, ...]:
        """The ids of the processes."""
        return tuple(process.pid for process in self._processes)

    def judge(self, tasks: Sequence[Task]) -> list[Score]:
        """A score for every task, in their order; where there is no verdict, the score's ``error`` says why."""
        progress = _Progress(tasks)
        try:
            while progress.is_open:
                self._hand_out(progress)
                for process in self._with_news():
                    self._listen(process, progress)
                for process in self._overdue():
                    self._give_up(process, progress)
        finally:
            # Left early by Ctrl-C or an error, a busy process would answer into the next call.
            for process in [process for process in self._processes if process.task is not None]:
                process.kill()
                self._replace(process)
        return progress.result()

    def close(self) -> None:
        """End all processes."""
        while self._processes:
            self._processes.pop().close()

    def _hand_out(self, progress: _Progress) -> None:
        for process in self._processes:
            if progress.waiting and process.is_free:
                number = progress.waiting[0]
                if process.begin(number, progress.tasks[number], self._deadline_s):
                    progress.waiting.popleft()

    def _with_news(self) -> list[GraderProcess]:
        """The processes that answered or died, as soon as there are any; none when the next one is overdue."""
        first = min(process.expires for process in self._processes)
        pause = None if math.isinf(first) else max(0.0, first - time.monotonic())
        ready = wait([process.connection for process in self._processes], pause)
        return [process for process in self._processes if process.connection in ready]

    def _overdue(self) -> list[GraderProcess]:
        now = time.monotonic()
        return [process for process in self._processes if process.expires <= now]

    def _listen(self, process: GraderProcess, progress: _Progress) -> None:
        number, was_ready = process.task, process.is_ready
        message = process.receive()
        if isinstance(message, Ready):
            if message.problem is not None:
                raise ConfigError(message.problem)
            self._failed_starts = 0
        elif message is None:
            status = process.reap()
            self._replace(process)
            if number is not None:
                progress.lose(number, status)
            elif not was_ready:
                self._count_failed_start(status)
        elif number is not None:
            progress.scores[number] = message

    def _give_up(self, process: GraderProcess, progress: _Progress) -> None:
        if process.task is None:
            raise RunError(f"a grader process was not ready after {START_TIMEOUT_S:g} s; the machine is overloaded")
        progress.scores[process.task] = Score(0.0, error=f"no verdict within {self._deadline_s:g} s")
        process.kill()
        self._replace(process)

    def _count_failed_start(self, status: int) -> None:
        self._failed_starts += 1
        if self._failed_starts == MAX_FAILED_STARTS:
            raise RunError(
                f"a grader process {_ending(status)} before it was ready, {MAX_FAILED_STARTS} times in a row; "
                "its last words are on standard error or in the log of the process that started it"
            )

    def _replace(self, process: GraderProcess) -> None:
        """Put a fresh process in the place of one that has ended."""
        self._processes[self._processes.index(process)] = self._launch()

    def _launch(self) -> GraderProcess:
        return GraderProcess(self._functions, self._preloaded, START_TIMEOUT_S)


class _Progress:
    """How far one call of ``judge`` has come; tasks are known by their place."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.waiting = deque(range(len(tasks)))
        self.scores: dict[int, Score] = {}
        self._deaths: Counter[int] = Counter()

    @property
    def is_open(self) -> bool:
        return len(self.scores) < len(self.tasks)

    def lose(self, number: int, status: int) -> None:
        """The process died over a task: try again in another one, or call it an error."""
        self._deaths[number] += 1
        if self._deaths[number] < MAX_DEATHS:
            self.waiting.appendleft(number)
        else:
            self.scores[number] = Score(0.0, error=f"the grader process {_ending(status)}, {MAX_DEATHS} times")

    def result(self) -> list[Score]:
        return [self.scores[number] for number in range(len(self.tasks))]


def _ending(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
