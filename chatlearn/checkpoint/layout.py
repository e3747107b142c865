"""Where checkpoints live, when one counts as complete, and which ones may be deleted.

``save_model/policy_trainer/`` (here: the root) holds one folder per training iteration and a file ``latest``::

    200/checkpoint.json        manifest; written last
    200/run_state.json         counters and position in the data
    200/config.yaml            the configuration it was trained with
    200/model/  optimizer/     shards of torch.distributed.checkpoint
    200/random/rank_0.pt       random states of each rank
    200/huggingface/           only with save_hf
    latest                     "200"
    best                       "150": the best one by keep_best, only with it
    195.damaged/               what was found damaged, for people to look at
    205.abandoned/             newer than the checkpoint that somebody sent the run back to

Saving is ``begin`` on the driver, ``save_shards`` on every rank, ``publish`` on the driver: the folder gets its name
in one rename. ``point_latest`` follows, for people and other tools: a run goes on from the newest folder, whatever that
file says.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from itertools import count
from math import isfinite, nan
from pathlib import Path

from chatlearn.checkpoint.durable import (
    REPLACED_PREFIX,
    STAGING_PREFIX,
    discard_staging,
    discard_unfinished,
    failures_named,
    files_below,
    open_staging,
    publish_folder,
    recover_folder,
    staging_of,
    sync,
    write_text,
)
from chatlearn.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    link_on_the_way,
    read_manifest,
    record_file,
    verify_checksums,
    verify_sizes,
    write_manifest,
)
from chatlearn.checkpoint.run_state import RUN_STATE_NAME, load_run_state
from chatlearn.errors import CheckpointError, UnreadableError

MODEL_FOLDER = "model"
OPTIMIZER_FOLDER = "optimizer"
RANDOM_FOLDER = "random"
MOST_DIGITS = 18  # of an iteration; more are garbage, and Python refuses to read very many as a number
LATEST_NAME = "latest"
BEST_NAME = "best"
# A manifest gets this name when its checkpoint is being deleted: from then on the folder is not complete, and a
# deletion that was cut short can be finished.
DELETED_NAME = "checkpoint.deleted.json"
# Endings of folders that no run goes on from. Damaged ones are deleted by people only.
DAMAGED = "damaged"
# Checkpoints that are newer than the one that somebody sent the run back to. They are the first to be pruned.
ABANDONED = "abandoned"
_ASIDE = re.compile(rf"[0-9]+\.({DAMAGED}|{ABANDONED})(\.[0-9]+)?")


def checkpoint_folder(root: Path, iteration: int) -> Path:
    """The folder of one training iteration, whether or not it exists."""
    return root / str(iteration)


def begin(root: Path, iteration: int) -> Path:
    """Make the staging folder in which iteration's checkpoint is prepared; the ranks write into what is returned.

    Refuses where the final name is taken by something that is not a complete checkpoint, before any rank has worked.
    """
    final = checkpoint_folder(root, iteration)
    with failures_named(final):
        recover(root)
        if final.exists():
            _require_checkpoint(final)
        return open_staging(final)


def _require_checkpoint(final: Path) -> None:
    if final.is_symlink():
        raise CheckpointError(f"{final}: in the way of a new checkpoint, and a link; move it away")
    try:
        read_manifest(final)
    except CheckpointError as error:
        raise CheckpointError(
            f"{final}: in the way of a new checkpoint and not a complete one itself ({error}); move it away"
        ) from None


def publish(root: Path, manifest: Manifest) -> Path:
    """Complete the staged checkpoint of ``manifest.iteration``, and give it its name.

    ``manifest.files`` holds what the ranks reported; every other file in the folder is measured here.
    """
    final = checkpoint_folder(root, manifest.iteration)
    staging = staging_of(final)
    reported = {record.name: record for record in manifest.files}
    with failures_named(final):
        discard_unfinished(staging)  # of an exporter that died: no part of the checkpoint
        found = files_below(staging)
        absent = sorted(set(reported) - set(found))
        if absent:
            raise CheckpointError(
                f"{staging}: {absent[0]}, which a rank wrote, is not visible here; all ranks must share one file system"
            )
        files = tuple(_measured(staging, name, reported) for name in found)
        write_manifest(staging, replace(manifest, files=files))
        publish_folder(final)
    return final


def point_latest(root: Path, iteration: int) -> None:
    """Let the file ``latest`` name the checkpoint that was published last."""
    with failures_named(root):
        write_text(root / LATEST_NAME, f"{iteration}\n")


def discard(root: Path, iteration: int) -> None:
    """Remove as much as can be removed of a checkpoint that was begun and is given up; the next one clears the rest."""
    shutil.rmtree(staging_of(checkpoint_folder(root, iteration)), ignore_errors=True)


def _measured(staging: Path, name: str, reported: dict[str, FileRecord]) -> FileRecord:
    if name not in reported:
        return record_file(staging, name)
    record = reported[name]
    size = (staging / name).stat().st_size
    if size != record.num_bytes:
        raise CheckpointError(f"{staging}: {name} has {size} bytes; its rank wrote {record.num_bytes}")
    return record


def list_complete(root: Path) -> tuple[Path, ...]:
    """The complete checkpoints below ``root`` by rising iteration (manifest readable, needed files in full length)."""
    return tuple(folder for folder in numbered(root) if _is_complete(folder))


def numbered(root: Path) -> list[Path]:
    """Every folder below ``root`` that is called as a checkpoint is, by rising iteration."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.is_dir() and _is_iteration(path.name)]
    return sorted(folders, key=lambda path: int(path.name))


def _is_iteration(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= MOST_DIGITS


def _is_complete(folder: Path) -> bool:
    try:
        manifest = verify_sizes(folder)
    except CheckpointError:
        return False
    return checkpoint_folder(folder.parent, manifest.iteration) == folder


def latest_complete(root: Path) -> Path | None:
    """The checkpoint to resume from: the newest complete one."""
    return next(reversed(list_complete(root)), None)


def best_complete(root: Path, measure: str) -> Path | None:
    """The checkpoint whose own weights were evaluated with the highest ``measure``, the newest of several equal ones.

    None where no checkpoint's episode has that number.
    """
    rated = [(value, int(folder.name), folder) for folder in list_complete(root) for value in _rating(folder, measure)]
    return max(rated)[-1] if rated else None


def _rating(folder: Path, measure: str) -> list[float]:
    """The number, if there is one and it is what was saved."""
    try:
        verify_checksums(folder, [file for file in read_manifest(folder).files if file.name == RUN_STATE_NAME])
        evaluation = load_run_state(folder).evaluation
    except CheckpointError:  # A resume will say so; until then it is one of many.
        return []
    return [evaluation[measure]] if isfinite(evaluation.get(measure, nan)) else []


def _point_at(root: Path, best: Path | None) -> None:
    """Let the file ``best`` name that checkpoint; without one there is no such file."""
    path = root / BEST_NAME
    if best is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != f"{best.name}\n":
        write_text(path, f"{best.name}\n")


def prune(root: Path, keep: int, measure: str | None = None) -> tuple[Path, ...]:
    """Delete all complete checkpoints but the newest ``keep`` (0 keeps all); returns the folders deleted.

    With a ``measure`` the best one by it stays too, and the file ``best`` names it. Abandoned ones count as the oldest.

    Only files that a checkpoint's own manifest lists are deleted; a folder with anything else in it stays, without
    being a checkpoint. The one that a resume would take is never deleted.
    """
    best = None if measure is None else best_complete(root, measure)
    _point_at(root, best)
    if keep == 0:
        return ()
    abandoned = [folder for folder in called(root, ABANDONED) if _has_list(folder)]
    doomed = tuple(folder for folder in [*abandoned, *list_complete(root)][:-keep] if folder != best)
    for folder in doomed:
        if folder.is_symlink():  # Somebody has put it elsewhere, where nothing is ours to delete.
            continue
        (folder / MANIFEST_NAME).rename(folder / DELETED_NAME)
        _delete_listed(folder)
    return doomed


def _has_list(folder: Path) -> bool:
    """Whether it is known what to delete; a folder whose manifest is damaged is left to people."""
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def _delete_listed(folder: Path) -> None:
    """Delete what the renamed manifest of ``folder`` lists, then folders that are empty, and the manifest last."""
    for record in read_manifest(folder, DELETED_NAME).files:
        if link_on_the_way(folder, record.name) is None:
            (folder / record.name).unlink(missing_ok=True)
    below = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    for path in sorted(below, reverse=True):
        _remove_empty(path)
    (folder / DELETED_NAME).unlink()
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def called(root: Path, ending: str) -> tuple[Path, ...]:
    """The folders below ``root`` that ``set_aside`` gave this ending, by rising iteration."""
    named = [path for path in root.glob(f"*.{ending}*") if _ASIDE.fullmatch(path.name) and path.is_dir()]
    return tuple(sorted(named, key=lambda path: (int(path.name.split(".")[0]), path.name)))


def set_aside(folder: Path, ending: str) -> Path:
    """Give a checkpoint a name that no run looks for, such as ``200.damaged``; returns its new place."""
    names = (f"{folder.name}.{ending}" + (f".{number}" if number > 1 else "") for number in count(1))
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    best = folder.parent / BEST_NAME
    with failures_named(folder):
        folder.rename(aside)
        sync(folder.parent)
        if best.is_file() and best.read_text(encoding="utf-8", errors="replace").strip() == folder.name:
            best.unlink()  # until the next checkpoint is saved, and all are compared again
    return aside


def recover(root: Path) -> None:
    """Finish or undo what a crash cut in half: replacements, deletions, saves.

    Call it before a run reads ``root``, while no checkpoint is being prepared there.
    """
    if not root.is_dir():
        return
    with failures_named(root):
        for aside in sorted(root.glob(f"{REPLACED_PREFIX}*")):
            recover_folder(root / aside.name.removeprefix(REPLACED_PREFIX))
        for staging in sorted(root.glob(f"{STAGING_PREFIX}*")):
            iteration = staging.name.removeprefix(STAGING_PREFIX)
            if _is_iteration(iteration) and staging.is_dir() and not staging.is_symlink():
                discard_staging(root / iteration)
        for folder in (*numbered(root), *called(root, ABANDONED)):
            if (folder / DELETED_NAME).is_file():
                _finish_deletion(folder)
            else:
                _remove_empty(folder)  # what is left when a deletion was cut short at its very end


def _finish_deletion(folder: Path) -> None:
    """Where the list of what to delete is damaged too, the folder is left to people."""
    try:
        _delete_listed(folder)
    except UnreadableError:
        raise
    except CheckpointError:
        set_aside(folder, DAMAGED)
