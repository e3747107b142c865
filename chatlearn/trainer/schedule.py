"""The learning rate of each optimizer step, computed from its number alone, so that a resumed run goes on exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A warm-up of so many optimizer steps, then a constant rate or a decay to ``min_lr``.

    ``total_iterations`` counts all steps of the run, warm-up included; ``min_lr`` and it matter to a decay only.
    """

    kind: ScheduleKind
    warmup_iterations: int
    min_lr: float
    total_iterations: int

    def __post_init__(self) -> None:
        assert self.warmup_iterations >= 0, "a warm-up cannot be shorter than nothing"
        assert self.kind == "constant" or self.warmup_iterations <= self.total_iterations, "no step is left to decay"


CONSTANT = Schedule("constant", warmup_iterations=0, min_lr=0.0, total_iterations=0)


def learning_rate(lr: float, schedule: Schedule, iteration: int) -> float:
    """The rate of step ``iteration``, which counts from 1; with W = ``warmup_iterations`` and N = ``total_iterations``:

    - warm-up, up to step W: ``lr * iteration / W``, so that the first step moves already and step W has ``lr``;
    - without a warm-up the first step has ``lr``: what follows reads W = 1;
    - ``constant``: ``lr``;
    - ``linear``: ``min_lr + (lr - min_lr) * (1 - t)`` with ``t = (iteration - W) / (N - W)``, at most 1;
    - ``cosine``: ``min_lr + (lr - min_lr) * (1 + cos(pi * t)) / 2`` (arXiv:1608.03983, without restarts).

    So the last step of the run, and any later one, has ``min_lr``.

    >>> linear = Schedule("linear", warmup_iterations=2, min_lr=0.0, total_iterations=4)
    >>> [learning_rate(1.0, linear, iteration) for iteration in (1, 2, 3, 4)]
    [0.5, 1.0, 0.5, 0.0]
    """
    assert iteration >= 1, "steps count from 1"
    peak = max(schedule.warmup_iterations, 1)
    if iteration <= peak:
        return lr * (iteration / peak)
    if schedule.kind == "constant":
        return lr
    assert schedule.min_lr <= lr, "a decay does not end above where it starts"
    progress = min((iteration - peak) / max(schedule.total_iterations - peak, 1), 1.0)
    remaining = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.min_lr + (lr - schedule.min_lr) * remaining
