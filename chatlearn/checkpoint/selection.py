"""Which checkpoint a run goes on from: the newest one that is what was saved, byte for byte.

The driver reads all small files through before it believes one of them. Shards are read through by the ranks that
load them (``sharded.load_shards``): there every rank takes a share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chatlearn.checkpoint.durable import refusals_named
from chatlearn.checkpoint.guarded_reader import METADATA_NAME
from chatlearn.checkpoint.layout import (
    DELETED_NAME,
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    RANDOM_FOLDER,
    checkpoint_folder,
    list_complete,
    numbered,
)
from chatlearn.checkpoint.manifest import MANIFEST_NAME, Manifest, verify_checksums, verify_sizes
from chatlearn.checkpoint.run_state import RUN_STATE_NAME, RunState, load_run_state
from chatlearn.errors import CheckpointError, ConfigError, UnreadableError

LARGE: Final = {MODEL_FOLDER, OPTIMIZER_FOLDER, RANDOM_FOLDER}  # what the ranks read
# Any of these tells that a folder was a checkpoint once, and not somebody's notes.
TRACES: Final = (MANIFEST_NAME, RUN_STATE_NAME, f"{MODEL_FOLDER}/{METADATA_NAME}")


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose small files are what was saved."""

    folder: Path
    manifest: Manifest
    state: RunState


@dataclass(frozen=True)
class Damage:
    """A checkpoint that is not what was saved, and what is wrong with it."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Choice:
    """The checkpoint to go on from, if there is one, and all damaged ones that are newer, newest first."""

    newest: Saved | None
    damaged: tuple[Damage, ...]


def choose(root: Path) -> Choice:
    """Find the newest checkpoint that can be believed; only reads.

    The file ``latest`` has no say: it is written after a checkpoint, so a crash or a full disk may have come between.
    Raises ``UnreadableError`` where it cannot be known now which one that is.
    """
    damaged: list[Damage] = []
    with refusals_named(root):
        folders = [folder for folder in numbered(root) if was_checkpoint(folder)]
        for folder in reversed(folders):
            try:
                return Choice(read_saved(folder), tuple(damaged))
            except UnreadableError:
                raise
            except CheckpointError as error:
                damaged.append(Damage(folder, str(error)))
    return Choice(None, tuple(damaged))


def was_checkpoint(folder: Path) -> bool:
    """Whether a numbered folder is or was a checkpoint, and is not just being deleted."""
    return not (folder / DELETED_NAME).exists() and any((folder / name).exists() for name in TRACES)


def read_saved(folder: Path) -> Saved:
    """Read what a checkpoint says, after comparing it with its checksums; all that is needed must have its full length.

    Raises ``CheckpointError`` that says what is wrong.
    """
    manifest = verify_sizes(folder)
    small = [record for record in manifest.needed if record.name.split("/", 1)[0] not in LARGE]
    if RUN_STATE_NAME not in {record.name for record in small}:
        raise CheckpointError(f"{folder}: {MANIFEST_NAME} does not list {RUN_STATE_NAME}; the checkpoint is incomplete")
    verify_checksums(folder, small)
    state = load_run_state(folder)
    if not int(folder.name) == manifest.iteration == state.train_iteration:
        raise CheckpointError(
            f"{folder}: {MANIFEST_NAME} speaks of iteration {manifest.iteration} and {RUN_STATE_NAME} of "
            f"{state.train_iteration}; the folder was renamed, or the checkpoint is damaged"
        )
    return Saved(folder, manifest, state)


def read_chosen(root: Path, iteration: int) -> Saved:
    """The checkpoint of ``iteration``, every byte that is needed compared: what is newer will be given up for it.

    Raises ``ConfigError`` that lists what there is where it is not there, and ``CheckpointError`` where it is damaged.
    """
    folder = checkpoint_folder(root, iteration)
    if not was_checkpoint(folder):
        present = ", ".join(path.name for path in list_complete(root)) or "none"
        raise ConfigError(
            f"runtime_args.load_data_checkpoint_iteration={iteration}: {root} has no such checkpoint; complete ones: "
            f"{present}"
        )
    saved = read_saved(folder)
    verify_checksums(folder, saved.manifest.needed)
    return saved


def strangers(root: Path, iteration: int) -> tuple[Path, ...]:
    """Folders that are called as later checkpoints will be, and never were any: in the way of one that is saved."""
    later = [folder for folder in numbered(root) if int(folder.name) > iteration and any(folder.iterdir())]
    return tuple(folder for folder in later if not was_checkpoint(folder) and not (folder / DELETED_NAME).exists())


def newer_than(root: Path, iteration: int) -> tuple[Path, ...]:
    """Every checkpoint, complete or not, of a later iteration."""
    return tuple(folder for folder in numbered(root) if int(folder.name) > iteration and was_checkpoint(folder))
