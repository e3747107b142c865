"""A checksum knows every change of the bytes it stands for, and tells which tensor changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatlearn.weights.checksum import BLOCK_BYTES, checksums

# Three ranges: less than a block, more than one, and one that fills its blocks to the end.
BORDERS = [(0, 1000), (BLOCK_BYTES, 2 * BLOCK_BYTES + 12), (3 * BLOCK_BYTES, 5 * BLOCK_BYTES)]


def random_memory(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (5 * BLOCK_BYTES,), dtype=torch.uint8, generator=generator)


def differing(left: Tensor, right: Tensor) -> list[int]:
    sums = zip(checksums(left, BORDERS), checksums(right, BORDERS), strict=True)
    return [index for index, (one, other) in enumerate(sums) if one != other]


def in_a_range(which: int, share: float, size: int) -> int:
    """A place for ``size`` bytes within a range."""
    start, end = BORDERS[which]
    return start + int(share * ((end - start) // size - 1)) * size


@settings(max_examples=60, deadline=None, derandomize=True)
@given(which=st.integers(0, 2), share=st.floats(0, 1), flipped=st.integers(1, 255), zeros=st.booleans())
def test_any_single_byte_is_missed_by_its_tensor_and_by_no_other(
    which: int, share: float, flipped: int, zeros: bool
) -> None:
    memory = torch.zeros(5 * BLOCK_BYTES, dtype=torch.uint8) if zeros else random_memory(0)
    changed = memory.clone()
    changed[in_a_range(which, share, 1)] ^= flipped
    assert differing(memory, changed) == [which]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    which=st.integers(0, 2),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
    only_sign=st.booleans(),
)
def test_two_values_that_changed_places_are_seen(
    which: int, shares: tuple[float, float], dtype: torch.dtype, only_sign: bool
) -> None:
    memory = random_memory(1)
    size = dtype.itemsize
    one, other = (in_a_range(which, share, size) for share in shares)
    if only_sign and one != other:  # the hardest case for sums that wrap around: only the topmost bit differs
        memory[other : other + size] = memory[one : one + size]
        memory[other + size - 1] ^= 128
    changed = memory.clone()
    changed[one : one + size] = memory[other : other + size]
    changed[other : other + size] = memory[one : one + size]
    assert differing(memory, changed) == ([] if torch.equal(changed, memory) else [which])


@pytest.mark.parametrize("shift", [1, 2, 8, 512, 4096, BLOCK_BYTES])
def test_bytes_that_all_moved_are_seen(shift: int) -> None:
    memory = random_memory(2)
    assert differing(memory, memory.roll(shift)) == [0, 1, 2]


def test_two_tensors_that_changed_places_are_both_seen() -> None:
    memory = random_memory(3)
    changed = memory.clone()
    changed[:1000], changed[BLOCK_BYTES : BLOCK_BYTES + 1000] = memory[BLOCK_BYTES : BLOCK_BYTES + 1000], memory[:1000]
    assert differing(memory, changed) == [0, 1]


def test_nothing_has_no_checksum() -> None:
    assert checksums(random_memory(4), []) == []
