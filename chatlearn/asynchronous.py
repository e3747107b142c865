"""The asynchronous schedule: engines never stop, and weights reach them in the middle of their answers.

An answer may have tokens of several versions, and each carries its own. How old the oldest may be when it is learned
from is bounded by ``runtime_args.max_staleness``: ``rollout.staleness`` keeps the books. Longer answers than others do
not hold up anybody, until they would become too old.
"""

from __future__ import annotations

from chatlearn.checkpoint.run_state import RunState
from chatlearn.episode import judge, publish, state_after, study
from chatlearn.observability.journal import Page
from chatlearn.rollout.staleness import StalenessBound
from chatlearn.team import Team


class Asynchronous:
    """Groups are asked of whichever engine has the least to do, as many as the bound allows."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self._bound = StalenessBound(
            team.args.max_staleness,
            team.layout.prompts_per_episode,
            first_version=team.first_episode - 1,
            last_version=team.args.num_episode,
        )

    def live(self, page: Page, state: RunState, episode: int) -> RunState:
        """One episode; engines go on through all of it."""
        team = self.team
        with page.phase("rollout"):
            chosen = self._await_batch(page, state.policy_version)
        with page.phase("reward"):
            graded = team.pipeline.take(chosen)
            self._bound.learn(chosen)
            samples = judge(team, page, graded, episode)

        num_steps = study(team, page, state, graded, samples)

        with page.phase("publish"):
            page.add_transfer(publish(team, version=episode))
        return state_after(state, num_steps, team.prompts.position_before(team.pipeline.unfinished()))

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
