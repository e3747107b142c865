"""The process that makes Hugging Face directories, as the driver sees it: asked once, looked at now and then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from chatlearn.checkpoint.adapters import AdapterRecord
from chatlearn.checkpoint.manifest import FileRecord
from chatlearn.cluster.cluster import Cluster
from chatlearn.cluster.fanout import Member, call, explain


@dataclass(frozen=True)
class Export:
    """What a Hugging Face directory is made from besides the shards: the base model, and the adapter on it."""

    base_dir: Path
    adapter: AdapterRecord | None


class Exporter:
    """One process. One that died is replaced, and the newcomer begins its work anew, once: the cause may be the work.

    ``tell`` says something to the person who watches.
    """

    def __init__(self, member: Member, cluster: Cluster, tell: Callable[[str], None]) -> None:
        self._member = member
        self._cluster = cluster
        self._tell = tell
        self._arriving: Any = None  # Ray's references: to what a newcomer says, and to what it is asked for
        self._files: Any = None
        self._begun_anew: Path | None = None
        call(member, "prepare")

    def files(self, folder: Path, export: Export) -> Sequence[FileRecord] | None:
        """The files of ``folder/huggingface`` when it is made, else ``None``; asks for it when called first.

        Raises ``WorkerError`` when it could not be made.
        """
        if not self._has_arrived():
            return None
        if self._files is None:
            self._files = call(self._member, "export", folder, export.base_dir, export.adapter)
        if not _is_ready(self._files):
            return None
        files, self._files = self._files, None
        try:
            return ray.get(files)
        except RayError as error:
            complaint = explain(error, self._member)
            if isinstance(error, RayActorError):
                self._replace()
                if self._begun_anew != folder:
                    self._begun_anew = folder
                    self._tell(f"{complaint}; another one makes the Hugging Face directory")
                    return None
            raise complaint from None

    def _has_arrived(self) -> bool:
        if self._arriving is None:
            return True
        if not _is_ready(self._arriving):
            return False
        arriving, self._arriving = self._arriving, None
        try:
            self._member = self._cluster.introduce(self._member, ray.get(arriving))
        except RayError as error:
            complaint = explain(error, self._member)
            self._replace()
            raise complaint from None
        self._cluster.settle(self._member)
        return True

    def _replace(self) -> None:
        self._member = self._cluster.replace(self._member)
        self._arriving = call(self._member, "arrive")


def _is_ready(reference: Any) -> bool:
    ready, _ = ray.wait([reference], timeout=0)
    return bool(ready)
