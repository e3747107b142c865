"""A rank's part in a checkpoint is written while the rank works on: it is copied first, and the copy goes to the disk.

Each rank leaves a report in the staging folder when its files are on the disk; when all reports are there, the shards
are complete. Nobody needs to ask a rank that computes.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from chatlearn.checkpoint.documents import read_document, text
from chatlearn.checkpoint.durable import failures_named, write_text
from chatlearn.checkpoint.manifest import FileRecord, read_files
from chatlearn.checkpoint.sharded import ShardState, write_shards
from chatlearn.errors import CheckpointError

REPORTS_FOLDER = "reports"


class BackgroundSaver:
    """One rank's hand on the disk, for one checkpoint at a time.

    ``group`` connects the same ranks as the trainer's own group, for the writing alone: the trainer's own is busy with
    gradients meanwhile. It must carry tensors of the host. ``on_accelerator``: what is copied may lie on a GPU.
    """

    def __init__(self, rank: int, group: dist.ProcessGroup | None, *, on_accelerator: bool) -> None:
        self._rank = rank
        self._group = group
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        # It keeps the memory of a copy for the next one: to get new memory takes longer than to fill it.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_accelerator,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_accelerator,
            )
        )
        self._writing: Future[None] | None = None

    def begin(self, staging: Path, state: ShardState, *, in_background: bool) -> None:
        """Write ``state`` below ``staging``. In the background: returns as soon as there is a copy of it.

        What goes wrong is told by ``fault``, and in the report where it can still be written.
        """
        self.wait()  # for one that was given up, because another rank could not write
        if in_background:
            self._writing = self._thread.submit(self._write, staging, self._copy(state))
        else:
            self._writing = Future()
            try:
                self._write(staging, state)
            except CheckpointError as error:
                self._writing.set_exception(error)
            else:
                self._writing.set_result(None)

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._writing is not None:
            wait([self._writing])

    def fault(self) -> str | None:
        """Why the last checkpoint could not be written; ``None`` while nothing has gone wrong."""
        if self._writing is None or not self._writing.done():
            return None
        error = self._writing.exception()
        if error is not None and not isinstance(error, CheckpointError):
            raise error  # a mistake of ours, not of the disk
        return None if error is None else str(error)

    def close(self) -> None:
        """Return when nothing is being written any more, and give the memory back."""
        self._thread.shutdown()
        self._stager.close()

    def _copy(self, state: ShardState) -> ShardState:
        # Any: the stager returns what it is given, or a promise of it where it was told to be asynchronous.
        copied: Any = self._stager.stage({"weights": state.weights, "moments": state.moments})
        return ShardState(copied["weights"], copied["moments"], state.random_states)

    def _write(self, staging: Path, state: ShardState) -> None:
        try:
            files = write_shards(staging, state, self._group)
        except CheckpointError as error:
            _write_report(staging, self._rank, {"fault": str(error)})
            raise
        _write_report(staging, self._rank, {"files": [asdict(file) for file in files]})


def _write_report(staging: Path, rank: int, report: dict[str, object]) -> None:
    with failures_named(staging):
        write_text(_report(staging, rank), json.dumps(report) + "\n")


def _report(staging: Path, rank: int) -> Path:
    return staging / REPORTS_FOLDER / f"rank_{rank}.json"


def take_reports(staging: Path, num_ranks: int) -> tuple[FileRecord, ...] | None:
    """The files of all ranks when everyone has reported, else ``None``; the reports are then removed.

    Raises ``CheckpointError`` with the first rank's words when one of them could not write.
    """
    paths = [_report(staging, rank) for rank in range(num_ranks)]
    with failures_named(staging):
        if not all(path.exists() for path in paths):
            return None
        files: list[FileRecord] = []
        for path in paths:
            document = read_document(path)
            if "fault" in document:
                raise CheckpointError(text(document, "fault", path))
            files.extend(read_files(document, path))
        shutil.rmtree(staging / REPORTS_FOLDER)
    return tuple(files)
