"""Calling several actors at once, and turning what goes wrong into an error that names role, rank and host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from chatlearn.cluster.waiting import WAITING
from chatlearn.errors import ChatLearnError, WorkerError

POLL_S = 0.05  # How long a Ctrl-C may go unnoticed while actors work, and what else goes on may have to wait.
ROOT_CAUSE_GRACE_S = 3.0  # When a rank dies its peers fail too, often sooner; so long we wait for the real culprit.


@dataclass(frozen=True)
class Member:
    """One actor of a group. ``handle`` is Ray's untyped proxy."""

    role: str
    rank: int
    host: str
    pid: int
    handle: Any
    log_file: str


Ticket = tuple[Any, Member]  # An object reference, and who owes us its value.


class Group:
    """Some actors that answer together. ``heartbeat`` is called while waiting and may raise to stop the wait."""

    def __init__(self, members: Sequence[Member], heartbeat: Callable[[], None]) -> None:
        self.members = tuple(members)
        self.heartbeat = heartbeat

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call ``method`` on every member with its own arguments; the answers are in the order of the members."""
        return collect(self.start(method, arguments), self.heartbeat)

    def start(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Ticket]:
        """As ``each``, without waiting; ``collect`` takes the tickets of several groups together."""
        pairs = zip(self.members, arguments, strict=True)
        return [(call(member, method, *values), member) for member, values in pairs]

    def map(self, method: str, *arguments: Any) -> list[Any]:
        """Call ``method`` on every member with the same arguments."""
        return self.each(method, [arguments] * len(self.members))

    def first(self, method: str, *arguments: Any) -> Any:
        """Call ``method`` on the first member only."""
        member = self.members[0]
        return collect([(call(member, method, *arguments), member)], self.heartbeat)[0]


def call(member: Member, method: str, *arguments: Any) -> Any:
    """Start one remote call and return its reference (or its generator)."""
    return getattr(member.handle, method).remote(*arguments)  # Ray's proxies are dynamic: this is their door.


def collect(tickets: Sequence[Ticket], heartbeat: Callable[[], None]) -> list[Any]:
    """Wait for every reference; raise ``WorkerError`` for the member that is most likely the cause of a failure."""
    waiting = dict(tickets)
    with WAITING.on(waiting):
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=POLL_S)
            heartbeat()
            for reference in ready:
                member = waiting.pop(reference)
                try:
                    ray.get(reference)
                except RayError as error:
                    raise _root_cause(error, member, waiting) from None
                WAITING.progress()
    return [ray.get(reference) for reference, _ in tickets]


def _root_cause(error: RayError, member: Member, waiting: dict[Any, Member]) -> ChatLearnError:
    """Prefer a process that died over one that merely complains about its dead peer."""
    if isinstance(error, RayActorError) or not waiting:
        return explain(error, member)
    ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=ROOT_CAUSE_GRACE_S)
    for reference in ready:
        try:
            ray.get(reference)
        except RayActorError as death:
            return explain(death, waiting[reference])
        except RayError:
            continue
    return explain(error, member)


def explain(error: RayError, member: Member) -> WorkerError:
    """One readable sentence for what Ray reports; an error of ours keeps its own words."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, ChatLearnError):
            words = str(cause)
        else:
            words = f"{type(cause).__name__}: {cause}"
        keep_traceback(str(error), member)  # For Ray the text of an error is its remote traceback.
        return WorkerError(member.role, member.rank, member.host, f"{words} (its log: {member.log_file})")
    if isinstance(error, RayActorError) and error.actor_init_failed:
        keep_traceback(str(error), member)
        last_line = str(error).strip().splitlines()[-1]
        return WorkerError(member.role, member.rank, member.host, f"its start failed: {last_line.strip()}")
    if isinstance(error, RayActorError):
        words = f"its process (pid {member.pid}) died; the end of its log may say why: {member.log_file}"
        return WorkerError(member.role, member.rank, member.host, words)
    if isinstance(error, GetTimeoutError):
        return WorkerError(member.role, member.rank, member.host, "it did not answer in time")
    return WorkerError(member.role, member.rank, member.host, f"Ray reports: {error}")


def keep_traceback(text: str, member: Member) -> None:
    """Put the worker's own traceback where its messages are: Ray brings it here and nowhere else."""
    log_file = Path(member.log_file)
    if log_file.parent.is_dir():
        with suppress(OSError), log_file.open("a", encoding="utf-8") as log:  # A full disk may be what it tells of.
            log.write(f"{text}\n")
