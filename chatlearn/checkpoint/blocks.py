"""Blocks of a tensor: which numbers a shard holds, which of them somebody wants, and where they lie in its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from chatlearn.models.naming import StoredPiece


@dataclass(frozen=True)
class Block:
    """A block of a tensor: where it begins on every axis, and its size there."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(shape: tuple[int, ...], piece: StoredPiece | None = None) -> Block:
        """The whole of a tensor, or the block that ``piece`` is."""
        offsets, sizes = [0] * len(shape), list(shape)
        if piece is not None and piece.expert is not None:
            offsets[0], sizes[0] = piece.expert, 1
        if piece is not None and piece.rows is not None:
            axis = 0 if piece.expert is None else 1
            offsets[axis], sizes[axis] = piece.rows[0], piece.rows[1] - piece.rows[0]
        return Block(tuple(offsets), tuple(sizes))

    def common(self, other: Block) -> Block:
        """The block that lies in both; of size 0 on some axis where there is none."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self._ends(), other._ends())
        return Block(begins, tuple(max(end - begin, 0) for begin, end in zip(begins, ends, strict=True)))

    def _ends(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(self.offsets, self.sizes, strict=True)))

    def within(self, outer: Block) -> tuple[slice, ...]:
        """The block as an index of the tensor that is ``outer`` alone."""
        begins = [offset - origin for offset, origin in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(begin, begin + size) for begin, size in zip(begins, self.sizes, strict=True))


@dataclass(frozen=True)
class Numbers:
    """Where the numbers of a block lie: from byte ``begin`` of a file, with strides as torch counts them."""

    path: Path
    begin: int
    dtype: torch.dtype
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A block that one file holds; ``locate`` finds out where, which may mean to read a little of the file.

    It raises ``ValueError`` where that is not what belongs to the block.
    """

    path: Path
    block: Block
    locate: Callable[[], Numbers]


def row_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose rows follow each other."""
    return tuple(prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


def follow_each_other(part: tuple[slice, ...], sizes: tuple[int, ...]) -> bool:
    """Whether the numbers of a part lie behind each other, when those of the block of these sizes do.

    >>> follow_each_other((slice(3, 4), slice(0, 2), slice(0, 5)), (8, 4, 5))
    True
    >>> follow_each_other((slice(3, 5), slice(0, 2), slice(0, 5)), (8, 4, 5))
    False
    """
    widths = [window.stop - window.start for window in part]
    first = next((axis for axis, width in enumerate(widths) if width != 1), len(widths))
    return all(width == size for width, size in zip(widths[first + 1 :], sizes[first + 1 :], strict=True))
