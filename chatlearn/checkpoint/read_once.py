"""Checksums of files that are read in pieces and in any order, so that no byte is read a second time to check it.

The checksum of two pieces, one behind the other, follows from theirs and from the length of the second: CRC-32 is the
remainder of a polynomial over the field of two elements, where a piece of n bytes behind means times x to the 8 n.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from chatlearn.checkpoint.durable import CHECKSUM_BLOCK_BYTES
from chatlearn.checkpoint.manifest import FileRecord
from chatlearn.errors import CheckpointError

# The polynomial of zlib and its two simplest elements. The highest bit is the coefficient of x to the 0.
CRC32_POLYNOMIAL = 0xEDB88320
ONE = 1 << 31
X = 1 << 30


@dataclass(frozen=True)
class Piece:
    """What was read from a file: where it began, how long it was, its CRC-32."""

    begin: int
    num_bytes: int
    crc32: int


class ReadOnce:
    """Remembers the checksum of every piece that is read; ``require`` reads only what nobody else has."""

    def __init__(self) -> None:
        self._pieces: dict[Path, list[Piece]] = {}

    def note(self, path: Path, begin: int, content: memoryview) -> None:
        """Take ``content`` down, which was read at ``begin``."""
        self._pieces.setdefault(path, []).append(Piece(begin, len(content), zlib.crc32(content)))

    def require(self, directory: Path, files: Iterable[FileRecord]) -> None:
        """Raise ``CheckpointError`` for the first of ``files`` that does not have the checksum it should have."""
        for record in files:
            path = directory / record.name
            found = f"{self._checksum(path, record.num_bytes):08x}"
            if found != record.crc32:
                raise CheckpointError(
                    f"{directory}: {record.name} has checksum {found} instead of {record.crc32}; "
                    "the checkpoint is damaged"
                )

    def _checksum(self, path: Path, num_bytes: int) -> int:
        value, position = 0, 0
        for piece in sorted(self._pieces.get(path, ()), key=lambda piece: piece.begin):
            if piece.begin < position:  # was read twice
                continue
            value = _read_on(path, position, piece.begin, value)
            value = joined(value, piece.crc32, piece.num_bytes)
            position = piece.begin + piece.num_bytes
        return _read_on(path, position, num_bytes, value)


def _read_on(path: Path, begin: int, end: int, value: int) -> int:
    """Go on from the checksum ``value`` of all before ``begin`` to that of all before ``end``."""
    if begin == end:
        return value
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while begin < end and (block := file.read(min(end - begin, CHECKSUM_BLOCK_BYTES))):
            value = zlib.crc32(block, value)
            begin += len(block)
    return value


def joined(first: int, second: int, num_bytes: int) -> int:
    """The CRC-32 of a piece and the ``num_bytes`` behind it, from those of both.

    >>> joined(zlib.crc32(b"hello "), zlib.crc32(b"world"), 5) == zlib.crc32(b"hello world")
    True
    """
    return _times(_x_to_the(8 * num_bytes), first) ^ second


def _times(left: int, right: int) -> int:
    """The product of two polynomials, modulo CRC-32's."""
    product = 0
    while left:
        if left & ONE:
            product ^= right
        left = (left << 1) & 0xFFFFFFFF
        right = (right >> 1) ^ (CRC32_POLYNOMIAL if right & 1 else 0)
    return product


@cache
def _x_to_the(exponent: int) -> int:
    """Remembered, because most pieces have the same few lengths."""
    power, square = ONE, X
    while exponent:
        if exponent & 1:
            power = _times(power, square)
        square = _times(square, square)
        exponent >>= 1
    return power
