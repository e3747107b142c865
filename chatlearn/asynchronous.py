"""The asynchronous schedule: engines never stop, and weights reach them in the middle of their answers.

An answer may have tokens of several versions, and each carries its own. How old the oldest may be when it is learned
from is bounded by ``runtime_args.max_staleness``: ``rollout.staleness`` keeps the books. Longer answers than others do
not hold up anybody, until they would become too old.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from chatlearn.checkpoint.run_state import RunState
from chatlearn.config.schedule import ScheduleName
from chatlearn.episode import examine, judge, publish, state_after, study
from chatlearn.observability.journal import Page
from chatlearn.records import OpenGroup, Prompt
from chatlearn.rollout.staleness import StalenessBound
from chatlearn.team import Team


class Asynchronous:
    """Groups are asked of whichever engine has the least to do, as many as the bound allows."""

    name: ClassVar[ScheduleName] = "async"

    def __init__(self, team: Team, open_groups: Sequence[OpenGroup]) -> None:
        self.team = team
        self._bound = StalenessBound(
            team.args.max_staleness,
            team.layout.prompts_per_episode,
            first_version=team.first_episode - 1,
            last_version=team.args.num_episode,
        )
        self._take_up(open_groups, version=team.first_episode - 1)

    def live(self, page: Page, state: RunState, episode: int) -> RunState:
        """One episode; engines go on through all of it."""
        team = self.team
        with page.phase("rollout"):
            chosen = self._await_batch(page, state.policy_version)
        with page.phase("reward"):
            graded = team.pipeline.take(chosen)
            self._bound.learn(chosen)
            samples = judge(team, page, graded, episode)

        if episode == team.first_episode:
            examine(team, page, state, graded, samples)
        num_steps = study(team, page, state, samples)

        with page.phase("publish"):
            page.add_transfer(publish(team, version=episode))
        groups = team.pipeline.open_groups()
        open_groups = [replace(group, version=self._bound.born(number)) for number, group in groups]
        return state_after(state, num_steps, team.prompts.position, open_groups)

    def _take_up(self, open_groups: Sequence[OpenGroup], version: int) -> None:
        """Go on with what an earlier life of the run had asked; what today's bound does not allow is asked anew."""
        refused: list[Prompt] = []
        for group in open_groups:
            if self._bound.admits(group.version, version):
                self._bound.begin(self.team.pipeline.take_up(group, self.team.asking), group.version)
            else:
                refused.append(group.prompt)
        self.team.prompts.give_back(refused)

    def _await_batch(self, page: Page, version: int) -> list[int]:
        """Keep the engines busy until there is a batch to learn from."""
        team = self.team
        for prompt in team.prompts.take(self._bound.num_allowed(version)):
            self._bound.begin(team.pipeline.ask(prompt, team.asking), version)

        def look() -> list[int] | None:
            judged = team.pipeline.judged()
            page.progress(min(len(judged), team.layout.prompts_per_episode), team.layout.prompts_per_episode)
            return self._bound.choose(version, judged)

        return team.pipeline.wait_for(look)
