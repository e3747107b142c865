"""Where checkpoints live, when one counts as complete, and which ones may be deleted.

``save_model/policy_trainer/`` (here: the root) holds one folder per training iteration and a file ``latest``::

    200/checkpoint.json        manifest; written last
    200/run_state.json         counters and position in the data
    200/model/  optimizer/     shards of torch.distributed.checkpoint
    200/random/rank_0.pt       random states of each rank
    200/huggingface/           only with save_hf
    latest                     "200"

Saving is ``begin`` on the driver, ``save_shards`` on every rank, ``publish`` on the driver: the folder gets its name
in one rename, and ``latest`` follows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from chatlearn.checkpoint.durable import (
    REPLACED_PREFIX,
    STAGING_PREFIX,
    discard_staging,
    failures_named,
    files_below,
    open_staging,
    publish_folder,
    recover_folder,
    staging_of,
    write_text,
)
from chatlearn.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    read_manifest,
    record_file,
    verify_sizes,
    write_manifest,
)
from chatlearn.errors import CheckpointError

MODEL_FOLDER = "model"
OPTIMIZER_FOLDER = "optimizer"
RANDOM_FOLDER = "random"
HUGGING_FACE_FOLDER = "huggingface"
LATEST_NAME = "latest"
# A manifest gets this name when its checkpoint is being deleted: from then on the folder is not complete, and a
# deletion that was cut short can be finished.
DELETED_NAME = "checkpoint.deleted.json"


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
    try:
        read_manifest(final)
    except CheckpointError as error:
        raise CheckpointError(
            f"{final}: in the way of a new checkpoint and not a complete one itself ({error}); move it away"
        ) from None


def publish(root: Path, manifest: Manifest) -> Path:
    """Complete the staged checkpoint of ``manifest.iteration``, give it its name, and point ``latest`` at it.

    ``manifest.files`` holds what the ranks reported; every other file in the folder is measured here.
    """
    final = checkpoint_folder(root, manifest.iteration)
    staging = staging_of(final)
    reported = {record.name: record for record in manifest.files}
    found = files_below(staging)
    absent = sorted(set(reported) - set(found))
    if absent:
        raise CheckpointError(
            f"{staging}: {absent[0]}, which a rank wrote, is not visible here; all ranks must share one file system"
        )
    with failures_named(final):
        files = tuple(_measured(staging, name, reported) for name in found)
        write_manifest(staging, replace(manifest, files=files))
        publish_folder(final)
        write_text(root / LATEST_NAME, f"{manifest.iteration}\n")
    return final


def _measured(staging: Path, name: str, reported: dict[str, FileRecord]) -> FileRecord:
    if name not in reported:
        return record_file(staging, name)
    record = reported[name]
    size = (staging / name).stat().st_size
    if size != record.num_bytes:
        raise CheckpointError(f"{staging}: {name} has {size} bytes; its rank wrote {record.num_bytes}")
    return record


def list_complete(root: Path) -> tuple[Path, ...]:
    """The complete checkpoints below ``root`` by rising iteration (manifest readable, every file in full length)."""
    return tuple(folder for folder in _numbered(root) if _is_complete(folder))


def _numbered(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.is_dir() and _is_iteration(path.name)]
    return sorted(folders, key=lambda path: int(path.name))


def _is_iteration(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _is_complete(folder: Path) -> bool:
    try:
        manifest = verify_sizes(folder)
    except CheckpointError:
        return False
    return checkpoint_folder(folder.parent, manifest.iteration) == folder


def latest_complete(root: Path) -> Path | None:
    """The checkpoint to resume from: the one ``latest`` names, or the newest complete one before it.

    Newer folders than ``latest`` names belong to an earlier life of the run, which went back from there.
    """
    complete = list_complete(root)
    eligible = [folder for folder in complete if int(folder.name) <= _pointer(root)]
    if eligible:
        return eligible[-1]
    return complete[-1] if complete else None


def _pointer(root: Path) -> float:
    """The iteration in ``latest``; infinity where the file is absent or unreadable, so that the newest counts."""
    path = root / LATEST_NAME
    if not path.is_file():
        return float("inf")
    content = path.read_text(encoding="utf-8", errors="replace").strip()
    return int(content) if _is_iteration(content) else float("inf")


def prune(root: Path, keep: int) -> tuple[Path, ...]:
    """Delete all complete checkpoints but the newest ``keep`` (0 keeps all); returns the folders deleted.

    Only files that a checkpoint's own manifest lists are deleted; a folder with anything else in it stays, without
    being a checkpoint. The one that a resume would take is never deleted.
    """
    if keep == 0:
        return ()
    pointer = _pointer(root)
    complete = sorted(list_complete(root), key=lambda folder: (int(folder.name) <= pointer, int(folder.name)))
    doomed = tuple(complete[:-keep])
    for folder in doomed:
        (folder / MANIFEST_NAME).rename(folder / DELETED_NAME)
        _delete_listed(folder)
    return doomed


def _delete_listed(folder: Path) -> None:
    """Delete what the renamed manifest of ``folder`` lists, then the manifest, then folders that are empty."""
    for record in read_manifest(folder, DELETED_NAME).files:
        (folder / record.name).unlink(missing_ok=True)
    (folder / DELETED_NAME).unlink()
    below = [path for path in folder.rglob("*") if path.is_dir()]
    for path in [*sorted(below, reverse=True), folder]:
        if not any(path.iterdir()):
            path.rmdir()


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
        for folder in _numbered(root):
            if (folder / DELETED_NAME).is_file():
                _delete_listed(folder)
