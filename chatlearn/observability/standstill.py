"""Nothing goes on any more: from what every process says of itself to who waits for whom, and who is at the end of it.

Waiting goes from process to process. Where it ends is the cause: at a process that waits for nobody, or at several that
wait for one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chatlearn.observability.whereabouts import Frame, Stack, Whereabouts

DRIVER = ("driver", 0)
INNERMOST = 6  # frames; a collective is entered through wrappers of torch's, and our own caller is further out
COLLECTIVES = "/torch/distributed/"
NO_COLLECTIVES = "/torch/distributed/checkpoint/"  # reads and writes files; it meets others through COLLECTIVES

Name = tuple[str, int]  # role, rank
Edges = Mapping[Name, frozenset[Name]]  # who waits for whom


@dataclass(frozen=True)
class Presence:
    """A process as it is seen from the driver.

    ``words`` is the last it said, ``None`` if nothing was heard. ``silent_s`` tells how long ago that was, where it
    says nothing more. ``state`` is what the system calls it, where that can be asked.
    """

    role: str
    rank: int
    host: str
    pid: int
    words: Whereabouts | None
    silent_s: float | None
    state: str | None

    @property
    def name(self) -> Name:
        """What it is known by in the run."""
        return self.role, self.rank

    @property
    def runs(self) -> bool:
        """It says what it does, and said so just now."""
        return self.words is not None and self.silent_s is None


@dataclass(frozen=True)
class Bottleneck:
    """Where waiting ends: ``those`` wait for nobody else, and ``waiters`` wait for them, some through others."""

    those: frozenset[Name]
    waiters: frozenset[Name]


def who_waits(presences: Sequence[Presence]) -> Edges:
    """Whom every process waits for: whose answer it wants, and the ranks of its role that it cannot go on without."""
    return {one.name: frozenset(_awaited(one, presences) - {one.name}) for one in presences}


def bottlenecks(edges: Edges) -> list[Bottleneck]:
    """Where waiting ends, whoever is waited for by most first."""
    reach = {name: _reachable(name, edges) for name in edges}
    everyone = set(edges) | {name for awaited in edges.values() for name in awaited}
    found: set[Bottleneck] = set()
    for name in everyone:
        beyond = reach.get(name, frozenset())
        those = frozenset({name} | beyond)
        if any(reach.get(other, frozenset()) | {other} != those for other in beyond):
            continue  # Somebody further on does not wait for this one.
        waiters = frozenset(other for other in edges if those & reach[other])
        if waiters:
            found.add(Bottleneck(those, waiters))
    return sorted(found, key=lambda bottleneck: (-len(bottleneck.waiters), sorted(bottleneck.those)))


def is_in_collective(stack: Stack) -> bool:
    """Whether the thread waits inside a collective of torch, as far as Python can see."""
    return any(COLLECTIVES in frame.path and NO_COLLECTIVES not in frame.path for frame in stack[-INNERMOST:])


def _awaited(one: Presence, presences: Sequence[Presence]) -> set[Name]:
    if one.words is None or not one.runs:
        return set()  # It does not run, so it waits for nobody: whatever it said last, it is where waiting ends.
    awaited = {(wait.role, wait.rank) for wait in one.words.waits}
    if awaited or not one.words.has_peers or one.words.call is None:
        return awaited
    peers = [other for other in presences if other.role == one.role and other.name != one.name]
    # An accelerator is waited for outside of torch's collectives; but no rank gets far without one that does not run.
    missing = {peer.name for peer in peers if not peer.runs}
    if missing or not is_in_collective(one.words.stack):
        return missing
    elsewhere = {peer.name for peer in peers if peer.words is None or not is_in_collective(peer.words.stack)}
    return elsewhere or {peer.name for peer in peers}


def _reachable(start: Name, edges: Edges) -> frozenset[Name]:
    """Everybody that ``start`` waits for, at last; itself only where waiting goes in a circle."""
    found: set[Name] = set()
    ahead = list(edges.get(start, ()))
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead.extend(edges.get(name, ()))
    return frozenset(found)


def innermost(stack: Stack) -> list[Frame]:
    """What of a stack tells most: where it is, and through which lines that are not a library's it came there."""
    ours = [frame for frame in stack[:-1] if not _is_library(frame)]
    return [*stack[-1:], *reversed(ours[-3:])]


def _is_library(frame: Frame) -> bool:
    return "/site-packages/" in frame.path or "/lib/python3" in frame.path or frame.path.startswith("<")
