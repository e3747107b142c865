"""``actors.json``: who takes part in a run, where, and in which state; for people and for tools that look after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from chatlearn.observability.whole_file import replacing

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Actor:
    """One process of the run; ``state`` is a word for people, such as ``running`` or ``stopped``."""

    role: str
    rank: int
    host: str
    pid: int
    state: str


class ActorsFile:
    """The file at ``path``, rewritten whole with every change."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, actors: Sequence[Actor]) -> None:
        """Replace what the file says with ``actors``."""
        document = {"schema": SCHEMA_VERSION, "actors": [asdict(actor) for actor in actors]}
        with replacing(self._path) as file:
            file.write(json.dumps(document, indent=1) + "\n")
