"""What a checkpoint says about itself: where it comes from, and every file with its size and checksum.

The manifest is written last. A folder without one is not a checkpoint. It has a checksum of itself, so that it can be
believed about the checksums of all other files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from chatlearn.checkpoint.adapters import AdapterRecord, read_adapter
from chatlearn.checkpoint.documents import (
    CHECKSUM,
    Document,
    checksum_of,
    flag,
    inner,
    integer,
    objects,
    read_document,
    require_checksum,
    require_schema,
    text,
)
from chatlearn.checkpoint.durable import ABSENT, checksum, refusals_named, write_text
from chatlearn.errors import CheckpointError

MANIFEST_NAME = "checkpoint.json"
HUGGING_FACE_FOLDER = "huggingface"
SCHEMA_VERSION = 2
OLDEST_SCHEMA = 1  # without a checksum of itself


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: its name relative to the folder, its size, and the CRC-32 of its bytes."""

    name: str
    num_bytes: int
    crc32: str


@dataclass(frozen=True)
class Provenance:
    """What a run is made from, by content and not by path: the training data, the weights of the base model, and the
    prompts that its tokenizer and chat template make of that data; older ones know no ``prompts_digest``."""

    data_hash: str
    base_digest: str
    prompts_digest: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The facts about one checkpoint.

    ``base_model`` is the model directory that training started from, ``architecture`` the class name in its
    ``config.json``, ``groupgemm`` whether experts ran as grouped matrix products, ``num_ranks`` the saving ranks,
    ``adapter`` what was trained where it was not the model itself; older ones know no ``provenance``.
    """

    iteration: int
    episode: int
    base_model: str
    architecture: str
    groupgemm: bool
    num_ranks: int
    files: tuple[FileRecord, ...] = ()
    adapter: AdapterRecord | None = None
    provenance: Provenance | None = None

    @property
    def needed(self) -> tuple[FileRecord, ...]:
        """The files that a resume or a conversion may read: all but the model for others."""
        return tuple(record for record in self.files if not _is_for_others(record))

    @property
    def for_others(self) -> tuple[FileRecord, ...]:
        """The files of the Hugging Face directory, which people may move away."""
        return tuple(record for record in self.files if _is_for_others(record))


def _is_for_others(record: FileRecord) -> bool:
    return PurePosixPath(record.name).parts[0] == HUGGING_FACE_FOLDER


def record_file(directory: Path, name: str) -> FileRecord:
    """Measure the file ``name`` below ``directory``."""
    path = directory / name
    return FileRecord(name=name, num_bytes=path.stat().st_size, crc32=checksum(path))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest``, which makes the folder complete."""
    document = {"schema_version": SCHEMA_VERSION, **asdict(manifest)}
    document[CHECKSUM] = checksum_of(document)
    write_text(directory / MANIFEST_NAME, json.dumps(document, indent=1) + "\n")


def read_manifest(directory: Path, name: str = MANIFEST_NAME) -> Manifest:
    """Read a checkpoint's manifest; raises ``CheckpointError`` for a folder that is missing or incomplete."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint folder")
    path = directory / name
    document = read_document(path)
    require_schema(document, SCHEMA_VERSION, path, oldest=OLDEST_SCHEMA)
    if integer(document, "schema_version", path) > OLDEST_SCHEMA or CHECKSUM in document:
        require_checksum(document, path)
    return Manifest(
        iteration=integer(document, "iteration", path),
        episode=integer(document, "episode", path),
        base_model=text(document, "base_model", path),
        architecture=text(document, "architecture", path),
        groupgemm=flag(document, "groupgemm", path),
        num_ranks=integer(document, "num_ranks", path),
        files=read_files(document, path),
        adapter=read_adapter(document, path),
        provenance=_read_provenance(document, path),
    )


def read_files(document: Document, path: Path) -> tuple[FileRecord, ...]:
    """The list of files in a document that was read from ``path``."""
    return tuple(
        FileRecord(
            name=_inner_name(text(entry, "name", path), path),
            num_bytes=integer(entry, "num_bytes", path),
            crc32=text(entry, "crc32", path),
        )
        for entry in objects(document, "files", path)
    )


def _read_provenance(document: Document, path: Path) -> Provenance | None:
    if document.get("provenance") is None:
        return None
    record = inner(document, "provenance", path)
    prompts = None if record.get("prompts_digest") is None else text(record, "prompts_digest", path)
    return Provenance(text(record, "data_hash", path), text(record, "base_digest", path), prompts)


def _inner_name(name: str, path: Path) -> str:
    """``name`` if it stays inside the folder: files are read and deleted by it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise CheckpointError(f"{path}: the file name {name!r} leads out of the folder")
    return name


def link_on_the_way(directory: Path, name: str) -> Path | None:
    """The first symbolic link on the way to ``name``: behind it lies what does not belong to the checkpoint."""
    path = directory
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            return path
    return None


def verify_sizes(directory: Path) -> Manifest:
    """Read the manifest and check that every needed file is there in full length; finds what a crash leaves, quickly.

    Raises ``CheckpointError`` where one is not, as ``UnreadableError`` where that cannot be known now.
    """
    with refusals_named(directory):
        manifest = read_manifest(directory)
        for record in manifest.needed:
            _require_whole(directory, record)
    return manifest


def missed_by_others(directory: Path, manifest: Manifest) -> str | None:
    """The first file of the Hugging Face directory that is not there in full length; nobody needs it to go on."""
    for record in manifest.for_others:
        try:
            with refusals_named(directory):
                _require_whole(directory, record)
        except CheckpointError:
            return record.name
    return None


def _require_whole(directory: Path, record: FileRecord) -> None:
    path = directory / record.name
    link = link_on_the_way(directory, record.name)
    if link is not None:
        raise CheckpointError(f"{link}: is a link, and a checkpoint consists of files; put the files in its place")
    if not path.is_file():
        raise CheckpointError(f"{directory}: {record.name} is missing; the checkpoint is incomplete")
    size = path.stat().st_size
    if size != record.num_bytes:
        raise CheckpointError(
            f"{directory}: {record.name} has {size} bytes instead of {record.num_bytes}; the checkpoint is damaged"
        )


def verify_checksums(directory: Path, files: Iterable[FileRecord]) -> None:
    """Read ``files`` through and compare their checksums; finds single flipped bits (about 4 GB/s from memory)."""
    for record in files:
        try:
            with refusals_named(directory / record.name):
                found = checksum(directory / record.name)
        except ABSENT as error:
            raise CheckpointError(f"{directory}: {record.name} cannot be read: {error}") from error
        if found != record.crc32:
            raise CheckpointError(
                f"{directory}: {record.name} has checksum {found} instead of {record.crc32}; the checkpoint is damaged"
            )
