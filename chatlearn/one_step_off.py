"""The schedule that is one step off: engines answer the next episode's prompts while the trainer learns.

Every answer is from the weights before the newest: its tokens are one version old when they are learned from.
``models.policy_trainer.rollout_correction`` weighs what that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar

from chatlearn.checkpoint.run_state import RunState
from chatlearn.cluster.interruption import Interrupted
from chatlearn.config.schedule import ScheduleName
from chatlearn.episode import ask_anew, examine, judge, publish, state_after, study
from chatlearn.observability.journal import Page
from chatlearn.records import OpenGroup
from chatlearn.team import Team


class OneStepOff:
    """``_asked`` are the groups of the episode that comes next; a resumed run has them from its earlier life."""

    name: ClassVar[ScheduleName] = "one_step_off"

    def __init__(self, team: Team, open_groups: Sequence[OpenGroup]) -> None:
        self.team = team
        self._asked: Sequence[int] = ()
        if len(open_groups) == team.layout.prompts_per_episode:
            self._asked = [team.pipeline.take_up(group, team.asking) for group in open_groups]
        else:  # An episode has another number of prompts than it had.
            ask_anew(team, open_groups)

    def live(self, page: Page, state: RunState, episode: int) -> RunState:
        """One episode; only the first one of a process waits for its own answers."""
        team = self.team
        with page.phase("rollout"):
            asked = self._asked or self._ask(episode)
            team.pipeline.await_answers(asked, page.progress)
        with page.phase("reward"):
            graded = team.pipeline.take(asked)
            samples = judge(team, page, graded, episode)
        if episode == team.first_episode:
            examine(team, page, state, graded, samples)
        self._asked = self._ask(episode + 1) if episode < team.args.num_episode else ()

        num_steps = study(team, page, state, samples)

        # Weights change between answers, never within one. Once the optimizer has stepped the episode counts: the loop
        # is interrupted after it.
        with page.phase("rollout"), suppress(Interrupted):
            team.pipeline.await_answers(self._asked, page.progress)
        with page.phase("publish"):
            page.add_transfer(publish(team, version=episode))
        open_groups = [replace(group, version=episode - 1) for _, group in team.pipeline.open_groups()]
        return state_after(state, num_steps, team.prompts.position, open_groups)

    def _ask(self, episode: int) -> Sequence[int]:
        team = self.team
        prompts = team.prompts.take(team.layout.prompts_per_episode)
        return team.pipeline.ask_planned(prompts, team.asking, team.seeds(episode, "rollout"))
