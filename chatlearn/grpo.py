"""GRPO as a story: roll out, score, compare, learn, publish. Read this file first.

An episode is one turn of that circle. The weights that an episode publishes are called by its number, and every token
carries the version it was sampled from; version 0 is the model one started with.

``Synchronous`` is the plain way to go round: engines and trainer take turns. The other schedules are files beside this
one, made of the same parts, which are in ``episode.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar, Final

from chatlearn.asynchronous import Asynchronous
from chatlearn.beginning import announce, beginning, open_journal, put_aside, resume
from chatlearn.checkpoint.run_lock import Hold, hold_directory
from chatlearn.checkpoint.run_state import RunState
from chatlearn.cluster.interruption import Interrupted, Interruption
from chatlearn.config.environment import Environment
from chatlearn.config.layout import Layout, layout_of
from chatlearn.config.schedule import ScheduleName, schedule_name
from chatlearn.config.schema import GrpoConfig
from chatlearn.episode import Schedule, ask_anew, evaluate, examine, judge, publish, state_after, study
from chatlearn.errors import DamagedCheckpointError, RunError, WorkerError
from chatlearn.observability.journal import Journal, Page
from chatlearn.one_step_off import OneStepOff
from chatlearn.over_sampling import OverSampling
from chatlearn.partial_rollout import PartialRollout
from chatlearn.provenance import provenance_of
from chatlearn.questions import read_questions
from chatlearn.records import OpenGroup
from chatlearn.saving import is_due, is_save_due, save
from chatlearn.team import Team, gather
from chatlearn.trainer.generators import seed_generators


def run(config: GrpoConfig) -> None:
    """Train until ``num_episode``; go on where an earlier run with the same ``output_dir`` stopped."""
    layout = layout_of(config, Environment.read())
    with hold_directory(layout.folders.output, announce) as hold:
        while True:
            try:
                train(config, layout, hold)
                break
            except DamagedCheckpointError as damage:  # The ranks have found it: once more, from the one before.
                put_aside(damage.folder, damage.reason)


def train(config: GrpoConfig, layout: Layout, hold: Hold) -> None:
    """The run itself, by the one process that may write into its directory."""
    questions = read_questions(config)  # First of all: a mistake in the data touches nothing that is written.
    state = beginning(config, layout, provenance_of(layout, questions.training))
    if state.episode >= config.runtime_args.num_episode:
        announce(f"finished at {state.episode}")
        return
    interruption = Interruption()

    def heartbeat() -> None:
        interruption.check()
        hold.require_ours()

    with (
        interruption.listening(),
        open_journal(config, layout, state) as journal,
        gather(config, layout, questions, state, journal, heartbeat) as team,
    ):
        resume(team, state, journal)
        publish(team, version=state.policy_version)
        if state.episode == 0 and team.args.enable_eval_before_training:
            with journal.page(0) as page:
                evaluate(team, page, episode=0)
        schedule = taking_turns(schedule_name(config), team, state)
        try:
            for episode in range(state.episode + 1, team.args.num_episode + 1):
                state = turn(team, journal, schedule, state, episode)
                interruption.check()
        except Interrupted:
            journal.say(f"interrupted; keeping the state after episode {state.episode}")
            hold.require_ours()
            save(team, state, journal)
            team.archive.finish()
            raise
        except RunError as error:
            if not is_of_trainer(error):  # Its ranks hold what is being written.
                team.archive.see_out(error, heartbeat)
            raise
        team.archive.finish()
        journal.curve()


def is_of_trainer(error: RunError) -> bool:
    """Whether a rank of the trainer has failed."""
    return isinstance(error, WorkerError) and error.role == "policy_trainer"


def taking_turns(name: ScheduleName, team: Team, state: RunState) -> Schedule:
    """The schedule of this name, in the middle of what an earlier life of the run left open with the same one."""
    if state.schedule == name:
        return SCHEDULES[name](team, state.open_groups)
    ask_anew(team, state.open_groups)
    return SCHEDULES[name](team, ())


def turn(team: Team, journal: Journal, schedule: Schedule, state: RunState, episode: int) -> RunState:
    """One episode with what belongs to its end: evaluation, metrics on disk, and only then the checkpoint."""
    team.archive.check()
    seed_generators(team.args.seed, episode, "driver", rank=0)  # An advantage function of one's own may draw numbers.
    team.policy.take_busy_s()  # What engines did before, such as evaluation, is not this episode's.
    with journal.page(episode) as page:
        state = replace(schedule.live(page, state, episode), schedule=schedule.name)
        page.add(team.care_numbers())
        if is_due(episode, team.args.eval_episode_interval):
            with suppress(Interrupted):  # The optimizer has stepped: the episode counts, and the loop stops after it.
                state = replace(state, evaluation=evaluate(team, page, episode))
    if is_save_due(team.args, episode):
        save(team, state, journal)
    return state


class Synchronous:
    """Engines answer, then the trainer learns, then engines get the weights: every answer is from the newest ones."""

    name: ClassVar[ScheduleName] = "sync"

    def __init__(self, team: Team, _leaves_nothing_open: Sequence[OpenGroup]) -> None:
        self.team = team

    def live(self, page: Page, state: RunState, episode: int) -> RunState:
        """One episode: from prompts to published weights. Who answers what is planned from the batch alone."""
        team = self.team
        with page.phase("rollout"):
            prompts = team.prompts.take(team.layout.prompts_per_episode)
            asked = team.pipeline.ask_planned(prompts, team.asking, team.seeds(episode, "rollout"))
            team.pipeline.await_answers(asked, page.progress)
            team.policy.sleep()  # Its memory is for training now; publishing wakes it with the next weights.

        with page.phase("reward"):  # Most answers were graded while others were still being sampled.
            graded = team.pipeline.take(asked)
            samples = judge(team, page, graded, episode)

        if episode == team.first_episode:
            examine(team, page, state, graded, samples)
        num_steps = study(team, page, state, samples)

        with page.phase("publish"):
            page.add_transfer(publish(team, version=episode))
        return state_after(state, num_steps, team.prompts.position)


SCHEDULES: Final[Mapping[ScheduleName, Callable[[Team, Sequence[OpenGroup]], Schedule]]] = {
    Synchronous.name: Synchronous,
    OverSampling.name: OverSampling,
    PartialRollout.name: PartialRollout,
    OneStepOff.name: OneStepOff,
    Asynchronous.name: Asynchronous,
}
