"""The tensors of a sharded checkpoint one by one, without a process group, however many ranks saved them."""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.utils import (
    _create_file_view,  # pyright: ignore[reportPrivateUsage] - a window of a file; torch's reader uses it for the same
)

from chatlearn.checkpoint.guarded_reader import GuardedReader, storage_places
from chatlearn.errors import CheckpointError

READ_BYTES = 16 * 1024 * 1024  # a part of a shard read at once: enough for the disk, little beside a model


class SavedTensors:
    """The folder that ``torch.distributed.checkpoint`` wrote; ``shapes`` maps each tensor's name to its full shape."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        metadata = GuardedReader(directory).read_metadata()
        places = storage_places(metadata, directory)
        self._places = {(index.fqn, index.offset): place for index, place in places.items()}
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def read_as_saved(self, name: str) -> Tensor:
        """The whole tensor in the dtype that it was saved with: the very same bits."""
        return self.read(name, self._tensors[name].properties.dtype)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The whole tensor as ``dtype``; needs memory for that and ``READ_BYTES``, not for a shard."""
        entry = self._tensors[name]
        whole = torch.empty(entry.size, dtype=dtype)
        for chunk in entry.chunks:
            place = self._places.get((name, chunk.offsets))
            if place is None:
                raise CheckpointError(f"{self._directory}: a part of '{name}' is in no file; the shards are damaged")
            window = [slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            path = self._directory / place.relative_path
            try:
                with path.open("rb") as file:
                    _read_chunk(file, place.offset, place.length, whole[tuple(window)])
            except (OSError, RuntimeError, ValueError) as error:
                raise CheckpointError(f"{path}: '{name}' cannot be read ({error}); the file is damaged") from error
        return whole


def _read_chunk(file: BufferedReader, offset: int, length: int, target: Tensor) -> None:
    """Fill ``target`` from the tensor that ``torch.save`` wrote at ``offset``."""
    with FakeTensorMode():  # everything about the tensor but its numbers, and where in the file they begin
        described: Tensor = torch.load(_window(file, offset, length), weights_only=True)
    if described.shape != target.shape:
        raise ValueError(f"shape {tuple(described.shape)} where the metadata says {tuple(target.shape)}")
    if not described.is_contiguous():  # rare: then rows do not follow each other in the file
        target.copy_(torch.load(_window(file, offset, length), weights_only=True))
        return
    begin = described.untyped_storage()._checkpoint_offset  # pyright: ignore[reportPrivateUsage] - torch documents it
    if begin is None:
        raise ValueError("its numbers are not stored with it")
    size = described.element_size()
    file.seek(offset + begin + int(described.storage_offset()) * size)
    for rows in _parts(target.view(1) if target.dim() == 0 else target, size):
        block = bytearray(rows.numel() * size)
        if file.readinto(block) != len(block):
            raise ValueError("the file ends inside the tensor")
        rows.copy_(torch.frombuffer(block, dtype=described.dtype).view(rows.shape))


def _window(file: BufferedReader, offset: int, length: int) -> IO[bytes]:
    """The bytes of one saved tensor as a file of their own."""
    return cast("IO[bytes]", _create_file_view(file, offset, length))  # torch annotates its parent class


def _parts(target: Tensor, element_size: int) -> tuple[Tensor, ...]:
    """Rows of about ``READ_BYTES``; none where there is nothing to read."""
    if target.numel() == 0:
        return ()
    row_bytes = target[0].numel() * element_size
    return target.split(max(READ_BYTES // row_bytes, 1))
