"""How good an answer was beside its siblings: the rewards of one group to one advantage per answer.

Laws of every function here: as many advantages as rewards; equal rewards give exact zeros; adding a constant to all
rewards changes nothing. To add one, write a function and a row in ``ADVANTAGES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

AdvantageFn = Callable[[Sequence[float]], list[float]]

# Keeps a group of almost equal rewards finite; the value of the original implementation.
MIN_STD = 1e-5


def group_normalised(rewards: Sequence[float]) -> list[float]:
    """GRPO: distance from the group's mean in (population) standard deviations (arXiv:2402.03300).

    >>> [round(value, 3) for value in group_normalised([1.0, 0.0, 0.0, 1.0])]
    [1.0, -1.0, -1.0, 1.0]
    """
    centred = group_centred(rewards)
    std = math.sqrt(math.fsum(value * value for value in centred) / len(rewards))
    return [value / (std + MIN_STD) for value in centred]


def group_centred(rewards: Sequence[float]) -> list[float]:
    """Dr.GRPO: distance from the group's mean; groups of all difficulties weigh the same (arXiv:2503.20783)."""
    # Differences to the first reward make the zeros of equal rewards exact, where a rounded mean would not.
    shifted = [reward - rewards[0] for reward in rewards]
    mean = math.fsum(shifted) / len(shifted)
    return [value - mean for value in shifted]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """RLOO: distance from the mean of the others; zero for an answer without siblings (arXiv:2402.14740)."""
    if len(rewards) == 1:
        return [0.0]
    scale = len(rewards) / (len(rewards) - 1)
    return [scale * value for value in group_centred(rewards)]


ADVANTAGES: dict[str, AdvantageFn] = {
    "grpo": group_normalised,
    "dr_grpo": group_centred,
    "rloo": leave_one_out,
}
