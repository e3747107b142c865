"""The schedule of partial rollouts: an answer that is not finished when its budget is used up goes on in the next
episode, from the weights of that time.

An episode samples a bounded number of tokens of each answer, so that long ones hold up nobody; it learns from whatever
was released to it, which is a different number of answers each time. ``rollout.partial`` keeps the books.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from chatlearn.checkpoint.run_state import RunState
from chatlearn.cluster.pipeline import Begun
from chatlearn.config.schedule import ScheduleName
from chatlearn.episode import compare, examine, publish, state_after, study, tell_of
from chatlearn.observability.journal import Page
from chatlearn.records import Completion, OpenGroup
from chatlearn.rollout.partial import PartialPool
from chatlearn.team import Team

NOTHING_YET = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), "", "length", ())


class PartialRollout:
    """Engines and trainer take turns; what is unfinished waits in the pool."""

    name: ClassVar[ScheduleName] = "partial_rollout"

    def __init__(self, team: Team, open_groups: Sequence[OpenGroup]) -> None:
        assert team.rounds is not None, "the layout of partial rollout has rounds"
        self.team = team
        self._pool = PartialPool(team.rounds, open_groups)
        self._is_examined = False

    def live(self, page: Page, state: RunState, episode: int) -> RunState:
        """One episode; where nothing was released there is nothing to learn, and the weights stay as they are."""
        team = self.team
        with page.phase("rollout"):
            self._sample(page, episode)
            team.policy.sleep()

        with page.phase("reward"):
            releases = self._pool.release()
            graded = [release.graded for release in releases]
            samples = [sample for one in releases for sample in compare(one.graded, team.advantage, one.earlier)]
            tell_of(team, page, graded, samples, episode)
            page.add({"partial_rollout_manager/num_train_samples": float(len(samples))})

        if samples and not self._is_examined:  # The first episodes may have nothing to learn from.
            examine(team, page, state, graded, samples)
            self._is_examined = True
        num_steps = study(team, page, state, samples) if samples else 0

        with page.phase("publish"):
            page.add_transfer(publish(team, version=episode))
        return state_after(state, num_steps, team.prompts.position, self._pool.open_groups())

    def _sample(self, page: Page, episode: int) -> None:
        """Let all answers of the pool grow by the budget of their round, new ones included."""
        team = self.team
        for prompt in team.prompts.take(team.layout.prompts_per_episode):
            self._pool.begin(prompt, [NOTHING_YET] * team.asking.num_completions)
        counts = enumerate(self._pool.num_in_round())
        page.add({f"partial_rollout_manager/round_{number}_samples": float(count) for number, count in counts})
        groups = self._pool.to_ask()
        begun = [
            Begun(group.prompt, group.unfinished, replace(team.asking.plan, max_tokens=self._pool.budget(group)))
            for group in groups
        ]
        asked = team.pipeline.ask_on(begun, team.seeds(episode, "rollout"))
        team.pipeline.await_answers(asked, page.progress)
        for group, graded in zip(groups, team.pipeline.take(asked), strict=True):
            self._pool.enter(group, graded)
