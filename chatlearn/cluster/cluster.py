"""Opening and closing the cluster, and giving every process of a run its place."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from chatlearn.cluster.fanout import Group, Member, call, collect
from chatlearn.cluster.placement import Demand, Placement, Slot
from chatlearn.cluster.seat import Arrival, Seat, forget_meetings
from chatlearn.cluster.watchdog import start_watchdog
from chatlearn.config.environment import prepare_local_ray
from chatlearn.errors import RunError, WorkerError
from chatlearn.observability.actors import Actor, ActorsFile

LISTENER_PATIENCE_S = 10.0
RAY_TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
LOGS = "logs"
CLOSE_TIMEOUT_S = 8.0  # Nothing of ours may be alive ten seconds after the end.


@dataclass(frozen=True)
class ClusterSpec:
    """What is needed to open a cluster: the address to join (``None`` starts a local Ray), what is asked of it, and
    where logs go."""

    address: str | None
    demand: Demand
    output_dir: Path


@dataclass(frozen=True)
class Place:
    """Where one process goes (``None``: anywhere), and its threads, the cores they stay on, and its environment."""

    slot: Slot | None
    num_cpus: int
    num_threads: int
    cores: tuple[int, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Troupe:
    """Actors of one class that will form a group, one for each place."""

    role: str
    worker: type
    places: Sequence[Place]


class Cluster:
    """A running Ray with this run's placement; knows every actor it started."""

    def __init__(self, spec: ClusterSpec, placement: Placement, heartbeat: Callable[[], None]) -> None:
        self.spec = spec
        self.placement = placement
        self.heartbeat = heartbeat
        self._members: list[Member] = []
        self._gone: list[Member] = []
        self._starting: set[tuple[str, int]] = set()  # Role and rank of newcomers that do not work yet.
        self._troupes: dict[str, Troupe] = {}
        self._actors_file = ActorsFile(spec.output_dir / "actors.json")

    @classmethod
    @contextmanager
    def open(cls, spec: ClusterSpec, heartbeat: Callable[[], None]) -> Generator[Cluster]:
        """Start a local Ray or join the one at ``spec.address``; on exit nothing of the run is left behind."""
        start_ray(spec)
        try:
            cluster = cls(spec, Placement.open(spec.demand, heartbeat), heartbeat)
            try:
                yield cluster
            except WorkerError as error:
                cluster.abandon("stopped", culprit=error)
                raise
            except BaseException:
                cluster.abandon("stopped")
                raise
            cluster.close()
        finally:
            ray.shutdown()
            if spec.address is None:
                forget_meetings(spec.output_dir / LOGS)

    def members(self) -> tuple[Member, ...]:
        """Every actor that has arrived."""
        return tuple(self._members)

    def spawn(self, troupes: Sequence[Troupe]) -> list[Group]:
        """Start one actor for every place of every troupe, all at once, and wait until they have arrived."""
        self._troupes |= {troupe.role: troupe for troupe in troupes}
        starting = [[self._start(troupe, rank) for rank in range(len(troupe.places))] for troupe in troupes]
        tickets = [(call(member, "arrive"), member) for members in starting for member in members]
        arrivals: Iterator[Arrival] = iter(collect(tickets, self.heartbeat))
        arrived = [[_met(member, next(arrivals)) for member in members] for members in starting]
        self._members.extend(member for members in arrived for member in members)
        self._report("running")
        return [Group(members, _wait) for members in arrived]

    def replace(self, member: Member) -> Member:
        """End a process that is dead or hangs, with its children, and start another one in its place.

        The newcomer must ``arrive`` and be introduced; once it works, it is settled.
        """
        end(member)
        self._members.remove(member)
        self._gone.append(member)
        newcomer = self._start(self._troupes[member.role], member.rank)
        self._members.append(newcomer)
        self._starting.add((newcomer.role, newcomer.rank))
        self._report("running")
        return newcomer

    def introduce(self, newcomer: Member, arrival: Arrival) -> Member:
        """A newcomer that has told where it is."""
        met = _met(newcomer, arrival)
        self._members[self._members.index(newcomer)] = met
        self._report("running")
        return met

    def settle(self, newcomer: Member) -> None:
        """A newcomer that works from now on."""
        self._starting.discard((newcomer.role, newcomer.rank))
        self._report("running")

    def close(self) -> None:
        """Let every actor say goodbye, then end it."""
        tickets = [(call(member, "close"), member) for member in self._members]
        ray.wait([reference for reference, _ in tickets], num_returns=len(tickets), timeout=CLOSE_TIMEOUT_S)
        self.abandon("finished")

    def abandon(self, state: str, culprit: WorkerError | None = None) -> None:
        """End every actor without asking."""
        for member in self._members:
            ray.kill(member.handle, no_restart=True)
        self._report(state, culprit)
        self.placement.close()

    def _start(self, troupe: Troupe, rank: int) -> Member:
        place = troupe.places[rank]
        log_file = str((self.spec.output_dir / LOGS / f"{troupe.role}_{rank}.log").absolute())
        one_host = self.spec.address is None
        seat = Seat(troupe.role, rank, len(troupe.places), place.num_threads, place.cores, log_file, one_host)
        if place.slot is None:
            options = {"num_cpus": place.num_cpus, "runtime_env": {"env_vars": place.environment}}
        else:
            options = self.placement.options(place.slot, place.environment)
        handle = ray.remote(troupe.worker).options(**options).remote(seat)
        return Member(troupe.role, rank, "a host it has not reached yet", 0, handle, log_file)

    def _report(self, state: str, culprit: WorkerError | None = None) -> None:
        driver = Actor("driver", 0, socket.gethostname(), os.getpid(), state)
        states = dict.fromkeys(self._starting, "starting") if state == "running" else {}
        if culprit is not None:
            states[culprit.role, culprit.rank] = "failed"
        rows = [
            Actor(member.role, member.rank, member.host, member.pid, states.get((member.role, member.rank), state))
            for member in self._members
        ]
        gone = [Actor(member.role, member.rank, member.host, member.pid, "replaced") for member in self._gone]
        with suppress(OSError):  # It is for people who look; a full disk may have room again.
            self._actors_file.write([driver, *rows, *gone])


def start_ray(spec: ClusterSpec) -> None:
    """Join ``spec.address``, or start a Ray of our own that listens on the loopback address and asks for a token."""
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if spec.address is not None:
        _require_listener(spec.address)
        try:
            ray.init(address=spec.address, **common)
        except (ConnectionError, RuntimeError, RayError) as error:  # RuntimeError: another version of Ray or Python
            raise RunError(f"cannot join the Ray cluster at RAY_ADDRESS={spec.address}: {error}") from None
        return
    prepare_local_ray()
    logging.getLogger(RAY_TOKEN_LOGGER).setLevel(logging.ERROR)  # That a token is asked for is no news to warn of.
    start_watchdog(os.getpid())
    num_cpus = max(os.cpu_count() or 1, spec.demand.num_slots + spec.demand.num_cpus)
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **common)


def _require_listener(address: str) -> None:
    """Raise ``RunError`` where nobody listens at ``host:port``; Ray itself would try in silence for many minutes."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdecimal():
        return  # "auto" and the like, which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENER_PATIENCE_S).close()
    except OSError as error:
        raise RunError(
            f"cannot join the Ray cluster at RAY_ADDRESS={address}: nobody answers there ({error}); start it with "
            "'ray start --head', or unset RAY_ADDRESS to have a Ray of the run's own"
        ) from None


def end(member: Member) -> None:
    """Kill a process. Its children are found from this machine only; elsewhere they notice that their parent died."""
    children: list[psutil.Process] = []
    if member.host == socket.gethostname():
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(member.pid).children(recursive=True)
    ray.kill(member.handle, no_restart=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _met(member: Member, arrival: Arrival) -> Member:
    return replace(member, host=arrival.host, pid=arrival.pid)


def _wait() -> None:
    """The heartbeat of work that is always finished."""
