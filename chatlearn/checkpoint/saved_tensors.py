"""The tensors of a checkpoint one by one, or a part of one, without a process group, however many ranks saved them.

Where numbers lie is all that differs between torch's sharded checkpoints (here: ``open_shards``), the original's and
safetensors; the reading is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from io import BufferedReader
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from chatlearn.checkpoint.blocks import Block, Numbers, Shard, follow_each_other, row_strides
from chatlearn.checkpoint.guarded_reader import GuardedReader, StorageInfo, storage_places
from chatlearn.checkpoint.read_once import ReadOnce
from chatlearn.checkpoint.saved_file import DescribedTensor, describe
from chatlearn.errors import CheckpointError
from chatlearn.models.naming import StoredPiece

READ_BYTES = 4 * 1024 * 1024  # read at once: enough for the disk, and still in the cache when it is converted
LARGEST_NUMBER_BYTES = 16


class SavedTensors:
    """``shapes`` maps each tensor's name to its full shape; ``checksums`` knows all that was read."""

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]], shards: Mapping[str, tuple[Shard, ...]]):
        self.shapes = dict(shapes)
        self.checksums = ReadOnce()
        self._directory = directory
        self._shards = shards
        self._buffer = memoryview(bytearray(READ_BYTES + LARGEST_NUMBER_BYTES))

    def read_as_saved(self, name: str) -> Tensor:
        """The whole tensor in the dtype that it was saved with: the very same bits."""
        first = self._shards[name][0]
        try:
            dtype = first.locate().dtype
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{first.path}: '{name}' cannot be read ({error}); the file is damaged") from error
        return self.read(name, dtype)

    def read(self, name: str, dtype: torch.dtype, piece: StoredPiece | None = None) -> Tensor:
        """The whole tensor, or the block of it that ``piece`` is, as ``dtype``.

        Needs memory for that and ``READ_BYTES``, not for a shard. Raises ``CheckpointError`` where a file is damaged
        or the shards leave something out.
        """
        wanted = Block.of(self.shapes[name], piece)
        result = torch.empty(wanted.sizes, dtype=dtype)
        found = 0
        for shard in self._shards[name]:
            common = wanted.common(shard.block)
            if 0 in common.sizes:
                continue
            try:
                self._fill(result[common.within(wanted)], shard, common.within(shard.block))
            except (OSError, RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{shard.path}: '{name}' cannot be read ({error}); the file is damaged"
                ) from error
            found += result[common.within(wanted)].numel()
        if found != result.numel():
            raise CheckpointError(f"{self._directory}: a part of '{name}' is in no file; the shards are damaged")
        return result if piece is None or piece.expert is None else result[0]

    def _fill(self, target: Tensor, shard: Shard, part: tuple[slice, ...]) -> None:
        numbers, sizes = shard.locate(), shard.block.sizes
        if numbers.strides == row_strides(sizes) and follow_each_other(part, sizes) and target.is_contiguous():
            self._read(numbers, _first(numbers, part), target.view(-1))
            return
        # Rare: rows do not follow each other, in the file or in the target.
        span = 1 + sum(stride * (size - 1) for stride, size in zip(numbers.strides, sizes, strict=True))
        stored = torch.empty(span, dtype=numbers.dtype)
        self._read(numbers, 0, stored)
        target.copy_(stored.as_strided(sizes, numbers.strides)[part])

    def _read(self, numbers: Numbers, first: int, target: Tensor) -> None:
        """Fill the flat ``target`` from the number at index ``first``."""
        size = numbers.dtype.itemsize
        position = numbers.begin + first * size
        with numbers.path.open("rb", buffering=0) as file:
            file.seek(position)
            for part in target.split(max(READ_BYTES // size, 1)):
                content = self._buffer[: part.numel() * size]
                if _read_whole(file, content) != len(content):
                    raise ValueError("the file ends inside the tensor")
                self.checksums.note(numbers.path, position, content)
                part.copy_(torch.frombuffer(content, dtype=numbers.dtype))
                position += len(content)


def _first(numbers: Numbers, part: tuple[slice, ...]) -> int:
    return sum(window.start * stride for window, stride in zip(part, numbers.strides, strict=True))


def _read_whole(file: IO[bytes], content: memoryview) -> int:
    """Fill ``content``; the system may give less than it was asked for. Returns the number of bytes that came."""
    filled = 0
    while filled < len(content) and (count := cast("BufferedReader", file).readinto(content[filled:])):
        filled += count
    return filled


def open_shards(directory: Path) -> SavedTensors:
    """The folder that ``torch.distributed.checkpoint`` wrote."""
    metadata = GuardedReader(directory).read_metadata()
    places = {(index.fqn, index.offset): place for index, place in storage_places(metadata, directory).items()}
    tensors = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    shapes = {name: tuple(entry.size) for name, entry in tensors.items()}
    shards = {
        name: tuple(_shard(directory, name, chunk, places.get((name, chunk.offsets))) for chunk in entry.chunks)
        for name, entry in tensors.items()
    }
    return SavedTensors(directory, shapes, shards)


def _shard(directory: Path, name: str, chunk: ChunkStorageMetadata, place: StorageInfo | None) -> Shard:
    if place is None:
        raise CheckpointError(f"{directory}: a part of '{name}' is in no file; the shards are damaged")
    path, sizes = directory / place.relative_path, tuple(chunk.sizes)
    return Shard(
        path, Block(tuple(chunk.offsets), sizes), cache(partial(_located, path, place.offset, place.length, sizes))
    )


def _located(path: Path, offset: int, length: int, sizes: tuple[int, ...]) -> Numbers:
    """Where the numbers are of the tensor that ``torch.save`` wrote to a window of a file."""
    with path.open("rb") as file:
        described = describe(file, offset, length, path)
    if not isinstance(described, DescribedTensor) or described.sizes != sizes:
        raise ValueError(f"what is there is not a tensor of the shape {sizes}, of which the metadata speaks")
    return described.numbers
