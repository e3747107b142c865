"""Processes of this machine that form one process group and run one task after another.

Starting a process costs seconds, a small task tenths: so a group stays for all tasks of its size.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from chatlearn import device
from chatlearn.config.environment import show_one_gpu, stay_on_loopback, usable_cores
from chatlearn.device import DeviceKind
from chatlearn.errors import ChatLearnError, WorkerError
from chatlearn.trainer.parallel import Rendezvous, close_process_group, open_process_group

Result = TypeVar("Result")

STANDARD_OUTPUT: Final = 1
STANDARD_ERROR: Final = 2
FAREWELL_S: Final = 10.0  # to leave the group in good order; who takes longer is ended


class Ranks:
    """The group of ``processes``, reached through ``pipes``, both in the order of ranks."""

    def __init__(self, pipes: Sequence[Connection], processes: Sequence[BaseProcess]) -> None:
        self._pipes = pipes
        self._processes = processes

    def run(self, task: Callable[..., Result], *arguments: object) -> Result:
        """Call ``task(*arguments)`` on every rank at once; the result is rank 0's.

        A rank's own error for users is raised here; a rank that dies of anything else is a ``WorkerError``, and what
        it said is on standard error. After an error the group is of no use: the others may wait for each other.
        """
        for pipe in self._pipes:
            pipe.send((task, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            for pipe in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]):
                rank = self._pipes.index(pipe)  # pyright: ignore[reportArgumentType] - wait returns what it was given
                answers[rank] = self._answer(rank)
        return answers[0]

    def _answer(self, rank: int) -> object:
        try:
            answer: object = self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join(FAREWELL_S)
            code = self._processes[rank].exitcode
            raise WorkerError("replay", rank, socket.gethostname(), f"its process ended with status {code}") from None
        if isinstance(answer, ChatLearnError):
            raise answer
        return answer

    def leave(self) -> None:
        """Dissolve the group and wait for its processes to end."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(FAREWELL_S)


@contextmanager
def open_ranks(num_ranks: int, kind: DeviceKind, imports: Sequence[str]) -> Generator[Ranks]:
    """A group of ``num_ranks``; the cores are shared out among them, and on CUDA each has a GPU of its own.

    ``imports`` are modules that all of them need: one server loads them, and the ranks are forks of it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(imports))
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    num_threads = max(1, usable_cores() // num_ranks)
    with tempfile.TemporaryDirectory(prefix="chatlearn-ranks-") as folder:
        meeting = Rendezvous(f"file://{Path(folder) / 'meeting'}", kind)
        try:
            for rank in range(num_ranks):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve, args=(there, rank, num_ranks, meeting, num_threads), daemon=True
                )
                process.start()
                there.close()  # so that the end of the process is the end of the pipe
                pipes.append(cast("Connection", here))  # its stubs think of Windows
                processes.append(process)
            ranks = Ranks(pipes, processes)
            yield ranks
            ranks.leave()
        finally:
            for process in processes:
                process.kill()


def _serve(pipe: Connection, rank: int, num_ranks: int, meeting: Rendezvous, num_threads: int) -> None:
    """The life of a rank: join the group, do what is asked, end when told to or when nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends everybody
    os.dup2(STANDARD_ERROR, STANDARD_OUTPUT)  # standard output belongs to the result of the command
    join(rank, rank, num_ranks, meeting)
    device.set_num_threads(num_threads)
    try:
        while (message := pipe.recv()) is not None:
            task, arguments = message
            pipe.send(_outcome(task, arguments))
    except EOFError:  # the parent is gone
        return
    close_process_group()


def _outcome(task: Callable[..., object], arguments: Sequence[object]) -> object:
    try:
        return task(*arguments)
    except ChatLearnError as error:
        return error


def join(rank: int, local_rank: int, num_ranks: int, meeting: Rendezvous) -> None:
    """Become one of the ranks: with a device of its own, and a network that leaves the machine only if it must."""
    if meeting.device_kind == "cuda":
        show_one_gpu(local_rank)
    if not meeting.place.startswith("tcp://"):  # a file: all are on this machine
        stay_on_loopback()
    open_process_group(rank, num_ranks, meeting)
