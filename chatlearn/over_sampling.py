"""The synchronous schedule with more prompts than are needed: nobody waits for the last ones.

``runtime_args.over_sampling_ratio`` times as many prompts are asked. As soon as enough of them are answered, the others
are stopped; their prompts come again in the next episode. Long answers are so seen less often than they occur: a price
for never waiting for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import ClassVar

from chatlearn.checkpoint.run_state import RunState
from chatlearn.config.schedule import ScheduleName
from chatlearn.episode import examine, judge, publish, state_after, study
from chatlearn.observability.journal import Page
from chatlearn.records import OpenGroup
from chatlearn.team import Team


class OverSampling:
    """Who is answered first is learned from."""

    name: ClassVar[ScheduleName] = "over_sampling"

    def __init__(self, team: Team, _leaves_nothing_open: Sequence[OpenGroup]) -> None:
        self.team = team

    def live(self, page: Page, state: RunState, episode: int) -> RunState:
        """One episode: as the synchronous one, with the tail of its answers cut off."""
        team, num_wanted = self.team, self.team.layout.prompts_per_episode
        with page.phase("rollout"):
            prompts = team.prompts.take(ceil(num_wanted * team.args.over_sampling_ratio))
            asked = team.pipeline.ask_planned(prompts, team.asking, team.seeds(episode, "rollout"))
            first = team.pipeline.await_first(asked, num_wanted, page.progress)
            stopped = team.pipeline.give_up(sorted(set(asked) - set(first)))
            team.prompts.give_back(stopped)
            team.pipeline.await_silence()
            team.policy.sleep()
            page.add({"rollout/stopped_prompts": float(len(stopped))})

        with page.phase("reward"):
            graded = team.pipeline.take(first)
            samples = judge(team, page, graded, episode)

        if episode == team.first_episode:
            examine(team, page, state, graded, samples)
        num_steps = study(team, page, state, samples)

        with page.phase("publish"):
            page.add_transfer(publish(team, version=episode))
        return state_after(state, num_steps, team.prompts.position)
