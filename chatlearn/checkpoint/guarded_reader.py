"""Read shards of torch.distributed.checkpoint without running anything that a checkpoint says.

Three places of torch 2.13 would: ``FileSystemReader.read_metadata`` calls ``pickle.load`` on ``.metadata``, its storage
records may name files outside the folder, and ``DefaultLoadPlanner.load_bytes`` calls ``torch.load`` with
``weights_only=False``. Each has its guard here. Tensors themselves are loaded weights-only by torch already.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch.distributed.checkpoint import metadata as saved
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.filesystem import (
    _StorageInfo as StorageInfo,  # pyright: ignore[reportPrivateUsage] - what a saved file consists of; has no other name
)
from torch.distributed.checkpoint.planner import ReadItem

from chatlearn.errors import CheckpointError

METADATA_NAME = ".metadata"

_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_RECORDS = (
    saved.Metadata, saved.MetadataIndex, saved.StorageMeta, saved.TensorProperties, saved.TensorStorageMetadata,
    saved.ChunkStorageMetadata, saved.BytesStorageMetadata,
)  # fmt: skip

# What a damaged pickle raises; nothing of ours runs inside.
DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError, RuntimeError,
)  # fmt: skip

# Everything a metadata file of tensors and plain values consists of. None of these does anything when it is made.
_ALLOWED: dict[tuple[str, str], object] = {
    ("torch", "Size"): torch.Size,
    # A path is saved as a record of where the checkpoint was written; it is never opened.
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,  # Python 3.13 and later
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): saved._MEM_FORMAT_ENCODING,  # pyright: ignore[reportPrivateUsage]
    ("torch.serialization", "_get_layout"): {str(torch.strided): torch.strided}.__getitem__,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
    **{("torch.distributed.checkpoint.metadata", record.__name__): record for record in _RECORDS},
}


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = _ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise CheckpointError(
                f"{self._path}: wants to load {module_name}.{global_name}, which no checkpoint of tensors "
                "contains; refused, the file may be hostile"
            )
        return allowed


class GuardedReader(FileSystemReader):
    """torch's reader of a folder of shards, with metadata that can name neither foreign classes nor foreign files."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory

    def read_metadata(self, *args: Any, **kwargs: Any) -> saved.Metadata:
        path = self._directory / METADATA_NAME
        try:
            content: object = _MetadataUnpickler(path.read_bytes(), path).load()
        except FileNotFoundError:
            raise CheckpointError(f"{self._directory}: {METADATA_NAME} is missing; the shards are incomplete") from None
        except DAMAGE as error:
            raise CheckpointError(f"{path}: not readable ({error}); the file is damaged") from None
        if not isinstance(content, saved.Metadata):
            raise CheckpointError(f"{path}: holds {type(content).__name__} instead of metadata; the file is damaged")
        for info in storage_places(content, self._directory).values():
            _require_inside(info, path)
        content.storage_meta = saved.StorageMeta(load_id=self.load_id)
        return content


def storage_places(metadata: saved.Metadata, directory: Path) -> dict[saved.MetadataIndex, StorageInfo]:
    """Which bytes of which file hold each part of each tensor."""
    records: object = metadata.storage_data
    if not isinstance(records, dict):
        raise CheckpointError(f"{directory}: {METADATA_NAME} does not say where the tensors lie; the file is damaged")
    places = cast("dict[saved.MetadataIndex, object]", records)  # a wrong key is never looked up
    for index, place in places.items():
        if not isinstance(place, StorageInfo):
            raise CheckpointError(f"{directory}: {METADATA_NAME} has no file for {index}; the file is damaged")
    return cast("dict[saved.MetadataIndex, StorageInfo]", records)  # values checked one by one above


def _require_inside(info: StorageInfo, path: Path) -> None:
    name = PurePosixPath(info.relative_path)
    if len(name.parts) != 1 or name.is_absolute() or name.name in {"..", ""}:
        raise CheckpointError(f"{path}: the file name {info.relative_path!r} leads out of the folder; refused")
    if info.transform_descriptors:
        raise CheckpointError(f"{path}: shards transformed by {info.transform_descriptors} are not ours; refused")


class GuardedPlanner(DefaultLoadPlanner):
    """torch's planner, with plain values loaded weights-only as tensors are.

    We save none, but it is the checkpoint that says whether an entry is a plain value.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        harmless = io.BytesIO()
        torch.save(load_plain(value, read_item.dest_index.fqn), harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)


def load_plain(source: Path | io.BytesIO, name: str) -> Any:
    """What ``torch.save`` wrote, if it consists of tensors, numbers, text and containers of them.

    Raises ``CheckpointError`` that calls the source ``name`` and names what else is in it; nothing of that is run.
    """
    try:
        strangers = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        if strangers:
            raise CheckpointError(
                f"{name}: wants to load {', '.join(sorted(strangers))}, which is neither a tensor nor a plain value; "
                "refused, the file may be hostile"
            )
        if isinstance(source, io.BytesIO):
            source.seek(0)
        return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{name}: not readable ({error}); the file is damaged") from None
