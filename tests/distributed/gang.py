"""A gang of processes that form one process group, run one function after another on all ranks, and stay alive.

Starting a process costs tenths, running a case too: so each world size is started once for all tests of a file.
"""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

# A generous bound on one case; a gang that hangs fails the test instead of the whole run.
CASE_DEADLINE_S = 120.0

PRELOADED = [
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "chatlearn.trainer.policy_trainer",
    "chatlearn.trainer.sharded_model",
]

Case = Callable[..., Any]
FAREWELL = b""


@dataclass(frozen=True)
class Failure:
    """What a rank reports instead of a result."""

    trace: str


class Gang:
    """``num_ranks`` processes on this host, until it is closed."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        # A server that has imported torch once forks all ranks, instead of each of them importing it for seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, rank, num_ranks, port), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, case: Case, *arguments: Any) -> list[Any]:
        """Call ``case(*arguments)`` on every rank at once; the results in the order of ranks."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((case, arguments)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(CASE_DEADLINE_S), f"rank {rank} did not answer within {CASE_DEADLINE_S:.0f} s"
            answers.append(pipe.recv())
        failures = [
            f"rank {rank}:\n{answer.trace}" for rank, answer in enumerate(answers) if isinstance(answer, Failure)
        ]
        assert not failures, "\n".join(failures)
        return answers

    def close(self) -> None:
        """Dissolve the process group and end the processes."""
        for pipe in self.pipes:
            pipe.send_bytes(FAREWELL)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


# How tests ask for a gang of some size. It is not in conftest.py, because ranks import what they run by the name of its
# module, and other folders of tests have a conftest too.
GangOf = Callable[[int], Gang]


def serve(pipe: Connection, rank: int, num_ranks: int, port: int) -> None:
    """The life of a rank: join the group, answer until told to stop."""
    import torch

    from chatlearn.trainer.parallel import Rendezvous, close_process_group, open_process_group

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    open_process_group(rank, num_ranks, Rendezvous(f"tcp://127.0.0.1:{port}", "cpu"))
    while (message := pipe.recv_bytes()) != FAREWELL:
        try:
            case, arguments = pickle.loads(message)  # may fail: its module may not be found here
            answer = case(*arguments)
        except Exception:  # noqa: BLE001 - whatever it is, the test shall see it
            answer = Failure(traceback.format_exc())
        pipe.send(answer)
    close_process_group()


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
