"""Checksums of tensors that lie end to end in one piece of memory, computed where they lie, all of them at once.

Memory is seen as blocks of 64 x 64 words of 64 bits. The sums of every row and of every column are two plain
reductions, the fastest thing that both a CPU and a GPU do with memory; everything after them is on 1/32 of the data. A
changed word changes the sum of its row and that of its column, an exchanged pair of words at least two of either kind.
The sums are scrambled before they are weighed by their place, so that what is left of a change is 64 random bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SIDE = 64
BLOCK_BYTES = 8 * _SIDE * _SIDE

# The golden ratio in 64 bits, as the signed number that torch takes: odd, and its multiples are spread evenly.
_SPREAD = -7046029254386353131
_LOW_HALF = 0xFFFFFFFF


def checksums(memory: Tensor, borders: Sequence[tuple[int, int]]) -> list[int]:
    """A signed 64-bit number for each range of bytes; a range begins at a multiple of ``BLOCK_BYTES``.

    What lies between the end of a range and the next block takes part, so both ends must see the same memory. It also
    counts where in ``memory`` a range lies. Waits for the device, once.
    """
    num_blocks = max((num_whole_blocks(end) for _, end in borders), default=0)
    blocks = memory[: num_blocks * BLOCK_BYTES].view(torch.int64).view(num_blocks, _SIDE, _SIDE)
    sums = torch.cat([blocks.sum(2), blocks.sum(1)], dim=1)  # [blocks, 2 * _SIDE]; they wrap around, equally everywhere
    weighed = _mixed(_mixed(sums).mul_(_weights(2 * _SIDE, memory)).sum(1)).mul_(_weights(num_blocks, memory))
    running = torch.cat([weighed.new_zeros(1), weighed.cumsum(0)])
    places = torch.tensor([[start // BLOCK_BYTES, num_whole_blocks(end)] for start, end in borders], dtype=torch.int64)
    starts, ends = places.reshape(-1, 2).to(memory.device).unbind(1)
    return (running[ends] - running[starts]).tolist()


def num_whole_blocks(num_bytes: int) -> int:
    """How many blocks hold so many bytes."""
    return -(-num_bytes // BLOCK_BYTES)


def _mixed(numbers: Tensor) -> Tensor:
    """A one-to-one scramble: afterwards a difference in the top bit is a difference in half of all bits."""
    scrambled = (numbers ^ (numbers >> 32 & _LOW_HALF)) * _SPREAD
    return scrambled ^ (scrambled >> 32 & _LOW_HALF)


def _weights(count: int, like: Tensor) -> Tensor:
    """An odd number for each place; multiplying by one loses nothing."""
    return torch.arange(1, count + 1, device=like.device).mul_(_SPREAD).bitwise_or_(1)
