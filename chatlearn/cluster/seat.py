"""Where an actor sits: its name, its log, its share of the cores, and where its ranks can meet."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from chatlearn import device
from chatlearn.cluster.presence import Observer, tell_whereabouts
from chatlearn.cluster.waiting import WAITING
from chatlearn.observability.whereabouts import whereabouts_path

if TYPE_CHECKING:
    from chatlearn.trainer.parallel import Rendezvous


@dataclass(frozen=True)
class Seat:
    """Where a worker sits: what it is called, its share of the cores, and the file that keeps what it writes.

    ``cores`` are those that its threads stay on, ``()`` any. ``one_host`` says that the whole run is on this machine,
    and needs to be reached by no other.
    """

    role: str
    rank: int
    num_ranks: int
    num_threads: int
    cores: tuple[int, ...]
    log_file: str
    one_host: bool


@dataclass(frozen=True)
class Arrival:
    """What a worker says of itself when it is up."""

    host: str
    pid: int


def take_seat(seat: Seat) -> None:
    """Send what this process writes to its log, take its share of the cores, and tell from now on what it does."""
    Path(seat.log_file).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(seat.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    if seat.cores:  # Before torch starts its threads, which go where this one is.
        os.sched_setaffinity(0, seat.cores)
    device.set_num_threads(seat.num_threads)
    tell_whereabouts(whereabouts_path(seat.log_file), Observer(seat.role, seat.rank))


def arrive() -> Arrival:
    """Look around in this process."""
    return Arrival(socket.gethostname(), os.getpid())


def meeting_place(seat: Seat) -> str:
    """Where the ranks of this worker's role can find each other, as torch's ``init_method``.

    On one machine that is a file, because torch's TCP store would listen on every network of the machine.
    """
    if seat.one_host:
        return f"file://{Path(seat.log_file).with_suffix('')}_meeting_{os.getpid()}"
    from chatlearn.trainer.parallel import hold_meeting_port

    address = ray.util.get_node_ip_address()
    return f"tcp://{address}:{hold_meeting_port(address)}"


def forget_meetings(logs: Path) -> None:
    """Remove the files that ranks of this machine met by, when all of them have gone; killed ones leave theirs."""
    for path in logs.glob("*_meeting_*"):
        with suppress(OSError):  # A run that ends has more important things to say.
            path.unlink()


def free_address() -> tuple[str, int]:
    """This node's address in the cluster, and a port that was free there a moment ago."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def meet(seat: Seat, meeting: Rendezvous) -> None:
    """Join the process group of this worker's role."""
    from chatlearn.trainer.parallel import open_process_group

    WAITING.join_peers()  # Before, because meeting is waiting for the others already.
    open_process_group(seat.rank, seat.num_ranks, meeting)
