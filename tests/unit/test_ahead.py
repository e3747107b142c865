"""A stream that is made ahead: the same items and errors, no more of them than allowed, and an end when it is left."""

from __future__ import annotations

import time
from collections.abc import Generator

import pytest
import torch
from torch import Tensor

from chatlearn.checkpoint.ahead import ahead


class Making:
    """Tensors of ``sizes`` bytes; counts how many were begun, and knows whether it was closed."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.begun = 0
        self.closed = False

    def stream(self, fault_at: int = -1) -> Generator[tuple[str, Tensor]]:
        try:
            for number, size in enumerate(self.sizes):
                self.begun += 1
                if number == fault_at:
                    raise ValueError("broken")
                yield str(number), torch.full((size,), number, dtype=torch.uint8)
        finally:
            self.closed = True


def settled(making: Making) -> int:
    """How many were begun once nothing moves any more."""
    before = -1
    while before != making.begun:
        before = making.begun
        time.sleep(0.05)
    return before


def test_everything_comes_in_order() -> None:
    making = Making(*range(200))
    for number, (name, tensor) in enumerate(ahead(making.stream(), max_bytes=500)):
        assert (name, tensor.tolist()) == (str(number), [number] * number)
    assert making.begun == 200
    assert making.closed


def test_no_more_is_made_than_there_is_room_for() -> None:
    making = Making(*[10] * 50)
    stream = ahead(making.stream(), max_bytes=40)
    next(stream)
    assert settled(making) == 1 + 4 + 1, "one is used, four wait, one is ready and waits for room"
    next(stream)
    assert settled(making) == 7
    stream.close()
    assert making.closed


def test_a_tensor_larger_than_the_room_passes_alone() -> None:
    making = Making(1000, 1000, 1000, 1000)
    stream = ahead(making.stream(), max_bytes=40)
    next(stream)
    assert settled(making) == 3
    assert len(list(stream)) == 3


def test_an_error_comes_in_its_turn_and_leaving_early_ends_the_stream() -> None:
    making = Making(1, 1, 1, 1)
    seen = []
    with pytest.raises(ValueError, match="broken"):
        for name, _ in ahead(making.stream(fault_at=2)):
            seen.append(name)
    assert seen == ["0", "1"]
    assert making.closed

    left = Making(*[30] * 100)
    for name, _ in ahead(left.stream(), max_bytes=40):
        if name == "3":
            break
    assert settled(left) < 10
    assert left.closed
