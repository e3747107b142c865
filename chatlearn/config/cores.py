"""Who computes on which cores of a machine without GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CoreSplit:
    """The cores of the engines, and those of trainer and reference model, which never work at the same time."""

    engines: tuple[int, ...]
    learners: tuple[int, ...]


def taking_turns(cores: Sequence[int]) -> CoreSplit:
    """Everybody has all of them: while one side works, the other waits."""
    return CoreSplit(tuple(cores), tuple(cores))


def side_by_side(cores: Sequence[int]) -> CoreSplit:
    """Half and half, the odd one to the engines; two that each use all cores slow each other down tenfold.

    >>> side_by_side((0, 1, 2, 3, 4))
    CoreSplit(engines=(2, 3, 4), learners=(0, 1))
    """
    half = len(cores) // 2
    return taking_turns(cores) if half == 0 else CoreSplit(tuple(cores[half:]), tuple(cores[:half]))
