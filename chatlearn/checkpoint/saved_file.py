"""What ``torch.save`` wrote, described instead of loaded: which tensors, and from which byte on their numbers lie.

Such a file is a zip archive: a pickle that tells how to build the objects, and for every tensor an uncompressed record
with its numbers. The pickle is read with records of ours in the place of all that it may name: nothing of torch's is
built, nothing that a file names is run, and what is not in the list is refused by its name.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from chatlearn.checkpoint.blocks import Numbers
from chatlearn.errors import CheckpointError

# A zip archive's local header: these many bytes, the lengths of name and extra field in the last four; then those two.
LOCAL_HEADER_BYTES = 30

STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, TypeError, KeyError, IndexError, AttributeError,
    OverflowError, NotImplementedError, MemoryError,
)  # fmt: skip

# By module and name, what stands for something that a pickle may name.
StandIns = Mapping[tuple[str, str], object]


@dataclass(frozen=True)
class DescribedTensor:
    """A tensor in a file: its sizes, and where its numbers are."""

    sizes: tuple[int, ...]
    numbers: Numbers


@dataclass(frozen=True)
class _Record:
    """An entry of the archive: its bytes in ``path``."""

    path: Path
    begin: int
    num_bytes: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.begin)
            return file.read(self.num_bytes)


def describe(file: BinaryIO, origin: int, length: int, path: Path, more: StandIns | None = None) -> Any:
    """The object that the ``length`` bytes from ``origin`` on are, with a ``DescribedTensor`` for every tensor in it.

    ``file`` is the open ``path``. ``more`` is what the pickle may name beside tensors and containers. Raises
    ``ValueError`` for what is damaged and ``CheckpointError`` for what wants more.
    """
    try:
        records = _records(file, origin, length, path)
        if records["byteorder"].read() != b"little":
            raise ValueError("its numbers are in the byte order of another kind of machine")
        return _Unpickler(records, path, more or {}).load()
    except DAMAGE as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, for readers that look from the end."""

    def __init__(self, file: BinaryIO, origin: int, length: int) -> None:
        self._file, self._origin, self._length, self._position = file, origin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("a position before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._origin + self._position)
        content = self._file.read(min(len(buffer), max(self._length - self._position, 0)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def _records(file: BinaryIO, origin: int, length: int, path: Path) -> dict[str, _Record]:
    """The archive's entries by their names below its one folder."""
    records: dict[str, _Record] = {}
    window = io.BufferedReader(_Window(file, origin, length))
    with zipfile.ZipFile(window) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed, which torch.save never does")
            window.seek(entry.header_offset)
            lengths = window.read(LOCAL_HEADER_BYTES)[-4:]
            name_bytes, extra_bytes = (int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
            begin = origin + entry.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
            if begin + entry.file_size > origin + length:
                raise ValueError(f"its entry {entry.filename!r} is said to be longer than the file")
            records[entry.filename.partition("/")[2]] = _Record(path, begin, entry.file_size)
    return records


@dataclass(frozen=True)
class _Storage:
    """The numbers of one record."""

    record: _Record
    dtype: torch.dtype

    def tensor(
        self, first: int, sizes: tuple[int, ...], strides: tuple[int, ...], *_: object
    ) -> DescribedTensor:  # what torch adds concerns training
        """What torch calls to build a tensor on this storage; ``first`` is the index of its first number."""
        size = self.dtype.itemsize
        last = sum(stride * (length - 1) for stride, length in zip(strides, sizes, strict=True))
        if 0 not in sizes and (first < 0 or last < 0 or (first + last + 1) * size > self.record.num_bytes):
            raise ValueError("its numbers are not stored with it")
        numbers = Numbers(self.record.path, self.record.begin + first * size, self.dtype, tuple(strides))
        return DescribedTensor(tuple(sizes), numbers)


# Python's own and not the one in C, which believes a single byte that asks for gigabytes.
class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportPrivateUsage] - has no other name
    def __init__(self, records: Mapping[str, _Record], path: Path, more: StandIns) -> None:
        super().__init__(io.BytesIO(records["data.pkl"].read()))
        self._records = records
        self._path = path
        self._allowed: dict[tuple[str, str], object] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _Storage.tensor,
            **{("torch", name): dtype for name, dtype in STORAGES.items()},
            **more,
        }

    def find_class(self, module: str, name: str) -> Any:
        stand_in = self._allowed.get((module, name))
        if stand_in is None:
            raise CheckpointError(
                f"{self._path}: wants to load {module}.{name}, which no checkpoint of tensors contains; "
                "refused, the file may be hostile"
            )
        return stand_in

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int()):
                return _Storage(self._records[f"data/{key}"], dtype)
            case _:
                raise ValueError("it refers to something that is not stored with it")
