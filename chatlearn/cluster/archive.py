"""Checkpoints on their way to the disk, while everybody works on: one at a time, and only the driver publishes.

The trainer's ranks copy their state, which is all they stand still for, and write the copy. When every rank has
reported, the exporter makes the Hugging Face directory; then the checkpoint is complete.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from chatlearn.checkpoint.background import take_reports
from chatlearn.checkpoint.manifest import FileRecord
from chatlearn.cluster.exporter import Export, Exporter
from chatlearn.cluster.fanout import Group
from chatlearn.cluster.waiting import WAITING
from chatlearn.errors import CheckpointError, RunError, WorkerError

LOOK_EVERY_S = 0.2  # Between two looks at a file system that others may need.
SEE_OUT_S = 300.0  # Large checkpoints take minutes; for longer no failed run should keep its machines.


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written in ``staging``. ``complete`` gives it its name once these files are there.

    ``export`` says what its Hugging Face directory is made from, where it gets one.
    """

    iteration: int
    staging: Path
    export: Export | None
    complete: Callable[[Sequence[FileRecord]], None]


class Archive:
    """``tell`` says something to the person who watches.

    A checkpoint that cannot be written is told of and given up, and the run goes on: there may be room again later.
    ``finish`` is for those who cannot go on without it.
    """

    def __init__(
        self, trainers: Group, exporter: Exporter | None, tell: Callable[[str], None], *, in_background: bool
    ) -> None:
        self._trainers = trainers
        self._exporter = exporter
        self._tell = tell
        self._in_background = in_background
        self._draft: Draft | None = None
        self._shards: Sequence[FileRecord] | None = None
        self._looked = self._begun = time.monotonic()
        self._numbers: dict[str, float] = {}
        self._failure: CheckpointError | None = None

    def begin(self, draft: Draft) -> None:
        """Begin to write a checkpoint; returns when training may go on. The one before must be settled."""
        assert self._draft is None, "the checkpoint before is still on its way"
        self._failure, self._shards, self._begun = None, None, time.monotonic()
        self._trainers.map("begin_save", draft.staging, self._in_background)
        self._draft = draft
        if not self._in_background:
            self.settle()

    def advance(self) -> None:
        """Move on what can be moved; never waits, and asks nobody who computes."""
        draft = self._draft
        if draft is None or time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        try:
            self._move(draft)
        except CheckpointError as error:
            self._give_up(draft, error)

    def check(self) -> None:
        """Ask the ranks, who must be idle, whether one of them failed and could not even report it."""
        draft = self._draft
        if draft is None or self._shards is not None:
            return
        faults = [fault for fault in self._trainers.map("saving_fault") if fault is not None]
        if faults and self._draft is draft:  # else it was told of while we asked
            self._give_up(draft, CheckpointError(faults[0]))

    def settle(self) -> None:
        """Wait until nothing is on its way. The ranks must be idle."""
        with WAITING.on(dict(enumerate(self._trainers.members))):
            while self._draft is not None:
                self.check()
                time.sleep(LOOK_EVERY_S)
                self._trainers.heartbeat()
                self.advance()

    def finish(self) -> None:
        """As ``settle``; raises ``CheckpointError`` when the last checkpoint could not be written."""
        self.settle()
        if self._failure is not None:
            raise self._failure

    def see_out(self, error: RunError, heartbeat: Callable[[], None]) -> None:
        """Let what is on its way arrive although ``error`` ends the run: for a while, as long as all ranks live.

        Asks nobody to stop computing. ``heartbeat`` may raise to stop the wait.
        """
        draft = self._draft
        if draft is None:
            return
        self._tell(f"the run ends: {error}. Checkpoint {draft.iteration} is being written, and gets its time for that")
        deadline = time.monotonic() + SEE_OUT_S
        signs = [reference for reference, _ in self._trainers.start("saving_fault", [()] * len(self._trainers.members))]
        while self._draft is not None and time.monotonic() < deadline and not _tells_of_death(signs):
            time.sleep(LOOK_EVERY_S)
            heartbeat()
            self.advance()

    def mourn(self, iteration: int, error: CheckpointError) -> None:
        """Tell of a checkpoint that is not to be."""
        self._failure = error
        self._numbers["checkpoint/failed"] = self._numbers.get("checkpoint/failed", 0.0) + 1
        self._tell(f"checkpoint {iteration} was not saved: {error}. The run goes on, and the next one is tried in time")

    def take_numbers(self) -> dict[str, float]:
        """What there is to tell of checkpoints since this was asked before."""
        numbers, self._numbers = self._numbers, {}
        return numbers

    def _move(self, draft: Draft) -> None:
        if self._shards is None:
            self._shards = take_reports(draft.staging, len(self._trainers.members))
        exported = self._exported(draft) if self._shards is not None else None
        if self._shards is None or exported is None:
            return
        files = (*self._shards, *exported)
        draft.complete(files)
        self._draft = None
        self._numbers["checkpoint/seconds"] = time.monotonic() - self._begun
        self._numbers["checkpoint/gigabytes"] = sum(file.num_bytes for file in files) / 1e9
        WAITING.progress()

    def _exported(self, draft: Draft) -> Sequence[FileRecord] | None:
        """The files of the Hugging Face directory, ``None`` while it is being made.

        Without it a checkpoint is as good to go on from, and can be converted later.
        """
        if draft.export is None or self._exporter is None:
            return ()
        try:
            return self._exporter.files(draft.staging, draft.export)
        except WorkerError as error:
            self._tell(
                f"checkpoint {draft.iteration} gets no Hugging Face directory ({error}); chatlearn convert makes it"
            )
            return ()

    def _give_up(self, draft: Draft, error: CheckpointError) -> None:
        self._draft = None
        shutil.rmtree(draft.staging, ignore_errors=True)  # A rank may be writing still: the next one clears the rest.
        self.mourn(draft.iteration, error)


def _tells_of_death(signs: Sequence[Any]) -> bool:
    """Whether one of these questions will have no answer; who computes has not answered yet."""
    ready, _ = ray.wait(list(signs), num_returns=len(signs), timeout=0)
    try:
        ray.get(ready)
    except RayError:
        return True
    return False
