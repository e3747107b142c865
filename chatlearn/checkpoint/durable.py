"""Files and folders that appear whole or not at all, also when the power fails."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from chatlearn.errors import CheckpointError, UnreadableError
from chatlearn.observability.whole_file import replacing, sync

# No other program makes folders with these names, so whatever has one is ours to delete.
STAGING_PREFIX = ".chatlearn-staging-"
REPLACED_PREFIX = ".chatlearn-replaced-"

CHECKSUM_BLOCK_BYTES = 4 * 1024 * 1024  # large enough that the checksum, not the call, takes the time


@contextmanager
def failures_named(folder: Path) -> Generator[None]:
    """Turn what the operating system refuses inside (full, read-only, no such place) into one readable error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error


# What the system says where nothing lies, or something else than was asked for.
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@contextmanager
def refusals_named(path: Path) -> Generator[None]:
    """Turn what the system cannot read inside (too many open files, no permission, a failing disk) into one error.

    What is absent is left to the caller: that is damage, and this is not.
    """
    try:
        yield
    except ABSENT:
        raise
    except OSError as error:
        raise UnreadableError(
            f"{path}: cannot be read now: {error}; that is no damage, and nothing was changed. Start again when it can"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old text or the new one, never a part.

    Makes the folder where it is missing; file and name have reached the disk when it returns.
    """
    with replacing(path) as file:
        file.write(text)


def checksum(path: Path) -> str:
    """CRC-32 of a file as eight hexadecimal digits: finds accidents of the disk, not attacks."""
    block = bytearray(CHECKSUM_BLOCK_BYTES)
    view = memoryview(block)
    value = 0
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            value = zlib.crc32(view[:size], value)
    return f"{value:08x}"


def files_below(folder: Path) -> list[str]:
    """Every file below ``folder``, as sorted relative names with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def staging_of(final: Path) -> Path:
    """Where the content of ``final`` is prepared: beside it, so that one rename can publish it."""
    return final.with_name(STAGING_PREFIX + final.name)


def open_staging(final: Path) -> Path:
    """Make an empty staging folder for ``final``; what an interrupted attempt left there goes."""
    recover_folder(final)
    discard_staging(final)
    staging = staging_of(final)
    staging.mkdir(parents=True)
    return staging


def discard_staging(final: Path) -> None:
    """Remove what an interrupted attempt to make ``final`` left behind, if anything."""
    staging = staging_of(final)
    if staging.exists():
        shutil.rmtree(staging)


def discard_unfinished(folder: Path) -> None:
    """Remove what interrupted attempts to make folders inside ``folder`` left behind."""
    for prefix in (STAGING_PREFIX, REPLACED_PREFIX):
        for left in folder.glob(f"{prefix}*"):
            shutil.rmtree(left)


def publish_folder(final: Path) -> None:
    """Let the staged folder take its final name in one rename; an earlier one of that name is removed afterwards.

    A crash between the two renames of a replacement leaves the earlier folder aside; ``recover_folder`` brings it back.
    """
    staging = staging_of(final)
    for path in staging.rglob("*"):
        sync(path)
    sync(staging)
    aside = final.with_name(REPLACED_PREFIX + final.name)
    if final.exists():
        final.rename(aside)
    staging.rename(final)
    sync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def recover_folder(final: Path) -> None:
    """Undo a replacement that a crash cut in half, or finish removing what it had replaced."""
    aside = final.with_name(REPLACED_PREFIX + final.name)
    if not aside.exists():
        return
    if final.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(final)
        sync(final.parent)
