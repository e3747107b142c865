"""From prompts to graded answers: engines answer, and every group that is whole goes to a grader at once.

Whoever waits for something else, such as the trainer, calls ``advance`` now and then, and the work goes on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import ray

from chatlearn.cluster.fanout import POLL_S, Member
from chatlearn.cluster.policy_group import Asked, PolicyGroup
from chatlearn.cluster.reward_group import RewardGroup
from chatlearn.cluster.waiting import WAITING
from chatlearn.records import Completion, Graded, OpenGroup, Prompt, Rollout
from chatlearn.rollout.assembly import Assembly
from chatlearn.rollout.dispatch import plan_dispatch
from chatlearn.rollout.engine import SamplingPlan

Found = TypeVar("Found")
Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True)
class Asking:
    """How a prompt is answered: so many times, sampled like this."""

    num_completions: int
    plan: SamplingPlan


@dataclass(frozen=True, eq=False)
class Begun:
    """Answers to a prompt that are to go on, as ``plan`` says."""

    prompt: Prompt
    answers: Sequence[Completion]
    plan: SamplingPlan


class Pipeline:
    """Groups are known by their numbers, which count up in the order in which they were asked.

    ``heartbeat`` is called while waiting for answers, and may raise to stop the wait.
    """

    def __init__(self, policy: PolicyGroup, graders: RewardGroup, heartbeat: Callable[[], None]) -> None:
        self._policy = policy
        self._graders = graders
        self._heartbeat = heartbeat
        self._assembly = Assembly()
        self._being_graded: dict[int, Rollout] = {}
        self._graded: dict[int, Graded] = {}
        self._owed: dict[int, Member] = {}  # Who has been asked something and has not answered, for the lookout.

    def ask_planned(self, prompts: Sequence[Prompt], asking: Asking, seeds: Sequence[int]) -> list[int]:
        """Ask a batch, one seed for each replica: the same batch and seeds sample the same answers."""
        expected = [self._assembly.expect(prompt, asking.num_completions) for prompt in prompts]
        groups = [[Asked(request, asking.plan) for request in requests] for _, requests in expected]
        self._policy.submit_planned(plan_dispatch(groups, len(seeds)), seeds)
        return [number for number, _ in expected]

    def ask(self, prompt: Prompt, asking: Asking) -> int:
        """Ask one prompt, of the engine that has the least to do."""
        number, requests = self._assembly.expect(prompt, asking.num_completions)
        self._policy.submit(requests, asking.plan)
        return number

    def ask_on(self, groups: Sequence[Begun], seeds: Sequence[int]) -> list[int]:
        """Have answers that are begun go on, planned like a batch; each comes out whole, with what there was of it."""
        expected = [self._assembly.expect(group.prompt, len(group.answers)) for group in groups]
        asked = [
            [Asked(replace(one, begun=answer), group.plan) for one, answer in zip(wanted, group.answers, strict=True)]
            for group, (_, wanted) in zip(groups, expected, strict=True)
        ]
        self._policy.submit_planned(plan_dispatch(asked, len(seeds)), seeds)
        return [number for number, _ in expected]

    def take_up(self, group: OpenGroup, asking: Asking) -> int:
        """A group of an earlier life of the run: its finished answers are judged, and the missing ones asked."""
        number, requests, whole = self._assembly.take_up(group.prompt, asking.num_completions, group.finished)
        if whole is not None:
            self._submit_to_grader(number, whole)
        else:
            self._policy.submit(requests, asking.plan)
        return number

    def advance(self) -> None:
        """Move on whatever can be moved; never waits."""
        for finished in self._policy.advance():
            WAITING.progress()
            whole = self._assembly.enter(finished)
            if whole is not None:
                self._submit_to_grader(*whole)
        for number, graded in self._graders.advance():
            WAITING.progress()
            if self._being_graded.pop(number, None) is not None:
                self._graded[number] = graded
        self._owed.clear()
        self._owed.update(enumerate([*self._policy.debtors(), *self._graders.debtors()]))

    def wait_for(self, look: Callable[[], Found | None]) -> Found:
        """Let engines and graders work until ``look`` finds something."""
        with WAITING.on(self._owed):
            while (found := look()) is None:
                self._wait_a_moment()
        return found

    def await_answers(self, numbers: Sequence[int], show: Progress) -> None:
        """Until the engines have answered all of these groups."""
        self.await_first(numbers, len(numbers), show)

    def await_first(self, numbers: Sequence[int], count: int, show: Progress) -> list[int]:
        """Until ``count`` of these groups are answered; returns them."""

        def look() -> list[int] | None:
            answered = sorted(set(numbers) - self._assembly.prompts().keys())[:count]
            show(len(answered), count)
            return answered if len(answered) == count else None

        return self.wait_for(look)

    def await_silence(self) -> None:
        """Until the engines have nothing in flight."""
        self.wait_for(lambda: self._policy.num_in_flight == 0 or None)

    def take(self, numbers: Sequence[int]) -> list[Graded]:
        """These groups, judged, in this order; waits for those that are not yet. They are forgotten here."""
        self.wait_for(lambda: self._graded.keys() >= set(numbers) or None)
        return [self._graded.pop(number) for number in numbers]

    def judged(self) -> list[int]:
        """The numbers of the groups that ``take`` gives without waiting, the oldest first."""
        return sorted(self._graded)

    def give_up(self, numbers: Sequence[int]) -> list[Prompt]:
        """Stop answering and judging these groups; returns their prompts, in the order in which they were asked."""
        prompts, names = self._assembly.give_up(numbers)
        self._policy.abort(names)
        for number in numbers:
            if number in self._being_graded:
                prompts[number] = self._being_graded.pop(number).prompt
            elif number in self._graded:
                prompts[number] = self._graded.pop(number).rollout.prompt
        return [prompts[number] for number in sorted(prompts)]

    def open_groups(self) -> list[tuple[int, OpenGroup]]:
        """All groups that were asked and not taken, with the answers they have, in the order they were asked."""
        rollouts = self._being_graded | {number: group.rollout for number, group in self._graded.items()}
        whole = {number: OpenGroup(rollout.prompt, rollout.completions) for number, rollout in rollouts.items()}
        return sorted((self._assembly.open_groups() | whole).items())

    def _submit_to_grader(self, number: int, rollout: Rollout) -> None:
        self._being_graded[number] = rollout
        self._graders.submit(number, rollout)

    def _wait_a_moment(self) -> None:
        waited = [*self._policy.references(), *self._graders.references()]
        if waited:
            ray.wait(waited, num_returns=1, timeout=POLL_S)
        else:
            time.sleep(POLL_S)  # What is waited for is no call: weights that a new engine needs, say.
        self._heartbeat()
        self.advance()
