"""The replicas of the grader: whole rollouts go in as they are complete, and come out judged.

Law: every rollout comes out exactly once. What a grader that died had not judged is judged by others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from chatlearn.cluster.fanout import Group, Member, call
from chatlearn.cluster.posts import BrokenError, Patience, Post, Succeeding, Succession
from chatlearn.errors import WorkerError
from chatlearn.records import Graded, Prompt, Rollout

# Enough that a grader never waits for the driver, and few enough that a slow one does not keep them from the others.
ROLLOUTS_AHEAD = 2


@dataclass(frozen=True)
class GraderCare:
    """What it takes to start a grader anew (the arguments of its ``open``) and to be patient with one.

    ``deadline_s`` is that of one answer. ``tell`` says something to the person who watches.
    """

    opening: tuple[Any, ...]
    deadline_s: float
    patience: Patience
    tell: Callable[[str], None]


class RewardGroup:
    """The graders as the loop sees them. Rollouts are known by a number of the caller's."""

    def __init__(self, graders: Group, cluster: Succeeding, care: GraderCare) -> None:
        self.num_replaced = 0
        self._group = graders
        self._cluster = cluster
        self._care = care
        self._posts = [Post(member, care.patience) for member in graders.members]
        self._waiting: deque[tuple[int, Rollout]] = deque()

    def submit(self, number: int, rollout: Rollout) -> None:
        """Have a rollout judged."""
        self._waiting.append((number, rollout))
        self._deal()

    def advance(self) -> list[tuple[int, Graded]]:
        """What has been judged since the last time; never waits. Graders that died or hang are replaced."""
        judged: list[tuple[int, Graded]] = []
        for post in self._posts:
            try:
                post.advance()
                for (number, _), graded in post.answers(self._allowance_s(post)):
                    post.failures.clear()
                    judged.append((number, graded[0]))
            except BrokenError as broken:
                self._replace(post, broken.error)
        self._deal()
        return judged

    def debtors(self) -> list[Member]:
        """Who has been asked something and has not answered."""
        return [post.member for post in self._posts if post.calls or post.awaited]

    def references(self) -> list[Any]:
        """What to wait for until ``advance`` has something to do."""
        return [reference for post in self._posts for reference in post.references()]

    def grade_gold(self, prompts: Sequence[Prompt]) -> list[str]:
        """Try the graders on gold answers; a line for each one that is not recognised."""
        num_workers = len(self._group.members)
        shares = [(list(prompts[worker::num_workers]),) for worker in range(num_workers)]
        return [line for lines in self._group.each("grade_gold", shares) for line in lines]

    def _deal(self) -> None:
        for post in sorted(self._posts, key=lambda post: len(post.calls)):
            while self._waiting and post.is_manned and len(post.calls) < ROLLOUTS_AHEAD:
                number, rollout = self._waiting.popleft()
                post.ask("grade", [rollout], subject=(number, rollout))

    def _allowance_s(self, post: Post) -> float:
        """A grader may need the deadline of every answer, one after the other."""
        if not post.calls:
            return 0.0
        _, rollout = post.calls[0].subject
        return self._care.deadline_s * len(rollout.completions)

    def _replace(self, post: Post, error: WorkerError) -> None:
        orphans = [pending.subject for pending in post.calls if pending.subject is not None]
        post.replace(error, self._succession(post))
        self._waiting.extendleft(reversed(orphans))
        self.num_replaced += 1
        self._care.tell(f"{error}; another one is started, and {len(orphans)} rollouts are graded again")

    def _succession(self, post: Post) -> Succession:
        post.member = newcomer = self._cluster.replace(post.member)
        arriving = call(newcomer, "arrive")
        yield [(arriving, newcomer)]
        post.member = newcomer = self._cluster.introduce(newcomer, ray.get(arriving))
        yield [(call(newcomer, "open", *self._care.opening), newcomer)]
