"""Where a process is: what it does, at which lines, whom it waits for. Both ends of the file that says so.

Every process of a run rewrites its own file, and the driver's lookout reads them when nothing goes on any more.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatlearn.observability.whole_file import rewrite

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Frame:
    """One level of a Python stack."""

    path: str
    line: int
    function: str


Stack = tuple[Frame, ...]  # The innermost frame is the last.


@dataclass(frozen=True)
class Wait:
    """Somebody's answer that a process waits for."""

    role: str
    rank: int
    for_s: float


@dataclass(frozen=True)
class Thread:
    """What a thread does that is not the one which works."""

    name: str
    stack: Stack


@dataclass(frozen=True)
class Whereabouts:
    """What a process says of itself.

    ``written_s`` is the time of its host's clock. ``call`` is what it was asked to do, ``None`` when nothing; ``stack``
    belongs to the thread that does it and has been the same for ``same_stack_s``. ``has_peers`` says that its calls
    contain collectives with the other ranks of its role. ``quiet_s`` has passed since it was given an answer.
    """

    role: str
    rank: int
    host: str
    pid: int
    written_s: float
    call: str | None
    has_peers: bool
    same_stack_s: float
    quiet_s: float
    waits: tuple[Wait, ...]
    stack: Stack
    threads: tuple[Thread, ...]


def whereabouts_path(log_file: str) -> Path:
    """The file of the process whose log is ``log_file``."""
    return Path(log_file).with_suffix(".where.json")


def write_whereabouts(path: Path, whereabouts: Whereabouts) -> None:
    """Replace what the file says."""
    rewrite(path, json.dumps({"schema": SCHEMA_VERSION} | asdict(whereabouts)))


def read_whereabouts(path: Path) -> Whereabouts | None:
    """What the file says; ``None`` where no process of this version has written one that can be read from here."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if document.pop("schema", None) != SCHEMA_VERSION:
        return None
    waits = tuple(Wait(**wait) for wait in document.pop("waits"))
    threads = tuple(Thread(thread["name"], _stack(thread["stack"])) for thread in document.pop("threads"))
    return Whereabouts(waits=waits, stack=_stack(document.pop("stack")), threads=threads, **document)


def _stack(frames: list[dict[str, Any]]) -> Stack:
    return tuple(Frame(**frame) for frame in frames)
