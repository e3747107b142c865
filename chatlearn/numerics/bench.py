"""What a diagnosis works with: the answers, the trainer's scores of them, and what the run knows of both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from chatlearn.numerics.change import NO_CHANGE, Change, Distribution
from chatlearn.numerics.gap import Gap, differences, gap_between, gap_of
from chatlearn.numerics.verdict import Trial
from chatlearn.records import FloatStream, Sample

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

    from chatlearn.device import DtypeName

# The trainer's log-probabilities, by token, with something changed.
Score = Callable[[Sequence[Sample], Change], Sequence[FloatStream]]


@dataclass(frozen=True)
class Facts:
    """What the run knows of engine and trainer.

    ``tolerance`` is for the mean gap, in nats. ``asked`` is what answers are to be sampled from, and
    ``known_distributions`` are others that an engine might have taken, each with the place it is written in.
    ``special_tokens`` are those that a template or a tokenizer puts in by itself. ``parameters`` are names in memory.
    ``other_versions`` tells of tokens that the engine itself says are from other weights; empty where there are none.
    ``has_moved``: the trainer's weights are no longer those of the model directory. ``shares_sequences``: several ranks
    work on one sequence, which transformers' own kernels cannot.
    """

    asked: Distribution
    dtype: DtypeName
    tolerance: float
    vocabulary: int
    known_distributions: tuple[tuple[str, Distribution], ...] = ()
    special_tokens: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    other_versions: str = ""
    has_moved: bool = False
    is_mixture: bool = False
    replays_routes: bool = False
    shares_sequences: bool = False


@dataclass(frozen=True)
class Bench:
    """Answers to look at, and what can be asked about them.

    ``again`` sends the trainer's weights to the engines anew and lets them answer some of the same prompts again.
    """

    facts: Facts
    samples: Sequence[Sample]
    score: Score
    again: Callable[[], Sequence[Sample]]

    @cached_property
    def own(self) -> Sequence[FloatStream]:
        """What the trainer says of the answers as it is."""
        return self.score(self.samples, NO_CHANGE)

    @cached_property
    def apart(self) -> NDArray[float64]:
        """Engine minus trainer, of every token of the answers."""
        return differences(self.samples, self.own)

    @property
    def gap(self) -> Gap:
        """The gap as it is."""
        return gap_of(self.apart)

    def gap_with(self, change: Change) -> Gap:
        """The gap with this change."""
        return gap_between(self.samples, self.score(self.samples, change))


# What may be the matter, tried one thing after the other until one explains the gap.
Cause = Callable[[Bench], Iterator[Trial]]
