"""Answers that are sampled in rounds: what is not finished in one episode goes on in the next, and nobody waits for it.

As in the original ChatLearn: an answer gets a budget of tokens in each of its rounds. A prompt's finished answers wait
until there are more of them than ``release_above``; from then on they are learned from, and later ones as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from chatlearn.records import Completion, Graded, OpenGroup, Prompt, Rollout, Score


@dataclass(frozen=True)
class Rounds:
    """``budgets``: tokens that an answer may grow by in its first round, its second, and so on."""

    budgets: tuple[int, ...]
    release_above: int

    @property
    def last(self) -> int:
        """The round after which every answer is finished."""
        return len(self.budgets) - 1


def round_budgets(max_tokens: int, shares: Sequence[float]) -> tuple[int, ...]:
    """The share of each round in whole tokens; the last round gets what is left, so that all add up.

    >>> round_budgets(100, (0.33, 0.33, 0.34))
    (33, 33, 34)
    """
    first = [int(max_tokens * share) for share in shares[:-1]]
    return (*first, max_tokens - sum(first))


@dataclass(frozen=True)
class Release:
    """Answers to learn from now, and the scores of answers to the same prompt that were released before."""

    graded: Graded
    earlier: tuple[Score, ...]


@dataclass
class PartialGroup:
    """A prompt whose answers are not all finished, or not all released."""

    prompt: Prompt
    unfinished: tuple[Completion, ...]
    round: int = 0
    waiting: list[Completion] = field(default_factory=list[Completion])
    scores: list[Score] = field(default_factory=list[Score])  # of every finished answer, the released ones first

    def enter(self, graded: Graded, last_round: int) -> None:
        """What this round made of the unfinished answers."""
        left: list[Completion] = []
        for completion, score in zip(graded.rollout.completions, graded.scores, strict=True):
            if completion.finish_reason == "length" and self.round < last_round:
                left.append(completion)
            else:
                self.waiting.append(completion)
                self.scores.append(score)
        self.unfinished, self.round = tuple(left), self.round + 1

    def release(self, release_above: int) -> Release | None:
        """The finished answers, if there are enough; they are not given out again."""
        if not self.waiting or (self.unfinished and len(self.scores) <= release_above):
            return None
        num_earlier = len(self.scores) - len(self.waiting)
        fresh = Graded(Rollout(self.prompt, tuple(self.waiting)), tuple(self.scores[num_earlier:]))
        self.waiting = []
        return Release(fresh, tuple(self.scores[:num_earlier]))


class PartialPool:
    """All groups that are under way, the oldest first; ``open_groups`` are those of an earlier life of the run."""

    def __init__(self, rounds: Rounds, open_groups: Sequence[OpenGroup] = ()) -> None:
        self._rounds = rounds
        self._groups = [
            PartialGroup(group.prompt, group.begun, group.round, list(group.finished), list(group.scores))
            for group in open_groups
        ]

    def begin(self, prompt: Prompt, answers: Sequence[Completion]) -> None:
        """A new prompt, with answers that have no token yet."""
        self._groups.append(PartialGroup(prompt, tuple(answers)))

    def to_ask(self) -> list[PartialGroup]:
        """The groups that have answers to go on with in this episode, those in later rounds first."""
        return [group for group in self._groups if group.unfinished]

    def budget(self, group: PartialGroup) -> int:
        """Tokens that its answers may grow by now."""
        return self._rounds.budgets[group.round]

    def enter(self, group: PartialGroup, graded: Graded) -> None:
        """The answers of a round."""
        group.enter(graded, self._rounds.last)

    def release(self) -> list[Release]:
        """Everything that can be learned from now. Groups that are done with are forgotten."""
        found = [group.release(self._rounds.release_above) for group in self._groups]
        self._groups = [group for group in self._groups if group.unfinished or group.waiting]
        return [release for release in found if release is not None]

    def num_in_round(self) -> list[int]:
        """How many answers are to be gone on with, by the number of the round that comes next."""
        return [
            sum(len(group.unfinished) for group in self._groups if group.round == number)
            for number in range(len(self._rounds.budgets))
        ]

    def open_groups(self) -> list[OpenGroup]:
        """Everything that is under way, for a checkpoint."""
        return [
            OpenGroup(group.prompt, tuple(group.waiting), group.unfinished, tuple(group.scores), round=group.round)
            for group in self._groups
        ]
