"""A post is a place in a group whose occupant may be replaced: who sits there, and what they have not answered yet.

Nothing here waits. Whoever looks after several posts asks each of them again and again, so that a dead or silent
process is noticed while the others work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from chatlearn.cluster.fanout import Member, Ticket, call, explain
from chatlearn.cluster.seat import Arrival
from chatlearn.errors import ChatLearnError, EngineFaultError, WorkerError

# What bringing in another occupant does between calls of ours: it yields the tickets that must be answered before it
# can go on.
Succession = Generator[Sequence[Ticket]]

MAX_FAILED_RESTARTS = 3


@dataclass(frozen=True)
class Patience:
    """How long an occupant may be silent, and within how long replacements that fail are counted together; seconds."""

    silence_s: float
    restart_s: float


class BrokenError(Exception):
    """The occupant of a post is at fault, and not what it was asked: another one may do better."""

    def __init__(self, error: WorkerError) -> None:
        self.error = error
        super().__init__(str(error))


class Succeeding(Protocol):
    """Who can start another process in the place of one; the cluster."""

    def replace(self, member: Member) -> Member: ...

    def introduce(self, newcomer: Member, arrival: Arrival) -> Member: ...

    def settle(self, newcomer: Member) -> None: ...


@dataclass
class Pending:
    """A call that is not answered yet, what it is about, and since when it is the oldest one of its post."""

    reference: Any
    subject: Any
    oldest_since: float


@dataclass
class Post:
    """One place. ``succession`` runs while another occupant is brought in; ``failures`` are the times of those that
    followed one another without an answer in between."""

    member: Member
    patience: Patience
    calls: deque[Pending] = field(default_factory=deque[Pending])
    succession: Succession | None = None
    awaited: Sequence[Ticket] = ()
    awaited_since: float = 0.0
    failures: list[float] = field(default_factory=list[float])

    @property
    def is_manned(self) -> bool:
        """Whether somebody works here."""
        return self.succession is None

    def ask(self, method: str, *arguments: Any, subject: Any = None) -> None:
        """Start a call whose answer ``answers`` will give."""
        self.calls.append(Pending(call(self.member, method, *arguments), subject, time.monotonic()))

    def answers(self, allowance_s: float = 0.0) -> Iterator[tuple[Any, Any]]:
        """Subject and value of every call that is answered, oldest first; ``allowance_s`` is patience on top.

        Raises ``BrokenError`` for an occupant that died, broke or was silent for too long, and ``WorkerError`` for what
        another one would meet too.
        """
        while self.calls and is_ready(self.calls[0].reference):
            pending = self.calls[0]
            value = take(pending.reference, self.member)  # Where this raises, the call stays: it was not answered.
            self.calls.popleft()
            if self.calls:
                self.calls[0].oldest_since = time.monotonic()
            yield pending.subject, value
        limit = self.patience.silence_s + allowance_s
        if self.calls and time.monotonic() - self.calls[0].oldest_since > limit:
            raise BrokenError(silent(self.member, limit))

    def replace(self, error: WorkerError, succession: Succession) -> None:
        """Forget what was asked of the occupant, and begin to bring in another.

        Raises ``WorkerError`` where ``MAX_FAILED_RESTARTS`` others failed within the patience for that, and none
        answered anything: the next would fail too.
        """
        now = time.monotonic()
        self.failures = [moment for moment in self.failures if now - moment <= self.patience.restart_s]
        if len(self.failures) >= MAX_FAILED_RESTARTS:  # With this one; the first is that of the one they replaced.
            raise given_up(error, MAX_FAILED_RESTARTS, self.patience.restart_s)
        self.failures.append(now)
        self.calls.clear()
        self.succession, self.awaited, self.awaited_since = succession, (), now

    def advance(self) -> None:
        """Take the next step of a succession, if what it waits for is there; raises ``BrokenError`` when it failed."""
        if self.succession is None:
            return
        if not all(is_ready(reference) for reference, _ in self.awaited):
            self._require_patience()
            return
        for reference, member in self.awaited:
            take(reference, member)
        try:
            self.awaited, self.awaited_since = next(self.succession), time.monotonic()
        except StopIteration:
            self.succession, self.awaited = None, ()

    def references(self) -> list[Any]:
        """What to wait for, until there is something to do here."""
        waited = [reference for reference, _ in self.awaited if not is_ready(reference)]
        return waited or [pending.reference for pending in list(self.calls)[:1]]

    def _require_patience(self) -> None:
        """A newcomer must come in time; others that it waits for, such as a trainer in its step, take theirs."""
        limit = self.patience.restart_s
        ours = all(member.role == self.member.role for _, member in self.awaited)
        if ours and time.monotonic() - self.awaited_since > limit:
            raise BrokenError(silent(self.member, limit))


def is_ready(reference: Any) -> bool:
    """Whether its value, or its failure, is here."""
    return bool(ray.wait([reference], timeout=0)[0])


def take(reference: Any, member: Member) -> Any:
    """The value of a call that is ready; raises ``BrokenError`` or ``WorkerError`` for what it ended with."""
    try:
        return ray.get(reference)
    except RayError as error:
        explained = explain(error, member)
        if is_the_processs_fault(error):
            raise BrokenError(explained) from None
        raise explained from None


def is_the_processs_fault(error: RayError) -> bool:
    """Whether the process is at fault, and not what it was asked."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, EngineFaultError) or not isinstance(error.cause, ChatLearnError)
    return isinstance(error, RayActorError)


def silent(member: Member, silence_s: float) -> WorkerError:
    """Somebody who does not answer."""
    return WorkerError(member.role, member.rank, member.host, f"it has not answered for {silence_s:.0f} s")


def given_up(error: WorkerError, num_replacements: int, window_s: float) -> WorkerError:
    """The last failure of a post that nobody can hold."""
    words = (
        f"{error.cause}; {num_replacements} replacements failed within {window_s:.0f} s "
        "(runtime_args.engine_restart_timeout_s) before they answered anything"
    )
    return WorkerError(error.role, error.rank, error.host, words)
