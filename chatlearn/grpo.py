"""GRPO as a story: roll out, score, compare, learn, publish. Read this file first.

An episode is one turn of that circle. The weights that an episode publishes are called by its number, and every token
carries the version it was sampled from; version 0 is the model one started with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import isfinite

import numpy as np

from chatlearn.algorithm.advantage import AdvantageFn
from chatlearn.checkpoint.capsule import BAD_STEP, CapsuleFacts, Reason
from chatlearn.checkpoint.run_state import RunState
from chatlearn.cluster.interruption import Interrupted, Interruption
from chatlearn.config.environment import Environment
from chatlearn.config.layout import layout_of
from chatlearn.config.schema import GrpoConfig
from chatlearn.gate import check_numerics
from chatlearn.observability.describe import describe_evaluation, describe_rollouts
from chatlearn.observability.journal import Journal, Page
from chatlearn.questions import read_questions
from chatlearn.records import Completion, Graded, Prompt, Sample, StepStats
from chatlearn.saving import (
    announce,
    begin_capsule,
    beginning,
    finish_capsule,
    is_due,
    is_save_due,
    open_journal,
    resume,
    save,
)
from chatlearn.team import Team, gather
from chatlearn.weights.wire import TransferStats


def run(config: GrpoConfig) -> None:
    """Train until ``num_episode``; go on where an earlier run with the same ``output_dir`` stopped."""
    layout = layout_of(config, Environment.read())
    state = beginning(config, layout)
    if state.episode >= config.runtime_args.num_episode:
        announce(f"finished at {state.episode}")
        return
    questions = read_questions(config)  # Before the journal: a mistake in the data touches nothing that is written.
    interruption = Interruption()
    with (
        interruption.listening(),
        open_journal(config, layout, state) as journal,
        gather(config, layout, questions, state, journal, interruption.check) as team,
    ):
        resume(team, state, journal)
        publish(team, version=state.policy_version)
        if state.episode == 0 and team.args.enable_eval_before_training:
            with journal.page(0) as page:
                evaluate(team, page, episode=0)
        try:
            for episode in range(state.episode + 1, team.args.num_episode + 1):
                state = turn(team, journal, state, episode)
                interruption.check()
        except Interrupted:
            journal.say(f"interrupted; keeping the state after episode {state.episode}")
            save(team, state, journal)
            raise
        journal.curve()


def turn(team: Team, journal: Journal, state: RunState, episode: int) -> RunState:
    """One episode with what belongs to its end: evaluation, metrics on disk, and only then the checkpoint."""
    with journal.page(episode) as page:
        state = live(team, page, state, episode)
        if is_due(episode, team.args.eval_episode_interval):
            with suppress(Interrupted):  # The optimizer has stepped: the episode counts, and the loop stops after it.
                evaluate(team, page, episode)
    if is_save_due(team.args, episode):
        save(team, state, journal)
    return state


def live(team: Team, page: Page, state: RunState, episode: int) -> RunState:
    """One synchronous episode: from prompts to published weights."""
    with page.phase("rollout"):
        prompts = team.prompts.take(team.layout.prompts_per_episode)
        seeds = team.seeds(episode, "rollout")
        rollouts = team.policy.rollouts(prompts, team.completions_per_prompt, team.sampling, seeds, page.progress)
        team.policy.sleep()  # Its memory is for training now; publishing wakes it with the next weights.

    with page.phase("reward"):
        graded = team.graders.grade(rollouts)
        samples = [sample for group in graded for sample in compare(group, team.advantage)]
        page.add(describe_rollouts(graded))
        page.keep(graded, samples)
        page.add({"policy_trainer/oversized_samples": float(team.trainer.num_oversized(samples))})

    if episode == team.first_episode:  # Of a run, and after every resume.
        with page.phase("numerics"):
            check_numerics(team, page, state, rollouts, samples, lambda some: ask_again(team, page, some, state))

    if team.reference is not None:  # Absent when kl_coef is zero.
        with page.phase("reference"), team.reference.resident():
            samples = team.reference.annotate(samples)

    with page.phase("train"), team.trainer.resident():
        if team.layout.steps_per_episode > 1:  # With a single step the step itself computes them.
            with page.phase("old_logprobs"):
                samples = team.trainer.annotate(samples)
        for number, batch in enumerate(team.batches(samples, episode), start=1):
            page.add_step(learn(team, page, batch, episode, state.train_iteration + number))
            page.progress(number, team.layout.steps_per_episode)
    page.add_capacity(team.trainer.capacity())

    with page.phase("publish"):
        page.add_transfer(publish(team, version=episode))

    position = team.prompts.position
    return RunState(
        episode=episode,
        train_iteration=state.train_iteration + team.layout.steps_per_episode,
        policy_version=episode,
        epoch=position.epoch,
        offset=position.offset,
        deferred=position.deferred,
        metrics_bytes=state.metrics_bytes,
    )


def learn(team: Team, page: Page, batch: Sequence[Sample], episode: int, iteration: int) -> StepStats:
    """One optimizer step. What it consumed is kept where that is asked for, and always when the step went wrong."""
    is_asked_for = is_due(iteration, team.args.capsule_interval)
    if is_asked_for:
        begin_capsule(team, page, iteration)
    stats = team.trainer.step(batch, iteration)
    went_wrong = not isfinite(stats.grad_norm)
    if went_wrong:
        page.say(f"step {iteration} was skipped on all ranks: the norm of its gradient is {stats.grad_norm}")
        if not is_asked_for:  # No rank has moved: the weights are still those that the step began with.
            begin_capsule(team, page, iteration)
    if is_asked_for or went_wrong:
        reason: Reason = BAD_STEP if went_wrong else "interval"
        finish_capsule(
            team, page, batch, CapsuleFacts(iteration, episode, reason, team.layout.trainer.num_ranks, stats)
        )
    return stats


def compare(group: Graded, advantage: AdvantageFn) -> list[Sample]:
    """Tell every answer how it did beside its siblings.

    An answer that the grader failed on is neither right nor wrong: it stays out of the comparison and out of the loss.
    """
    graded = [score.value for score in group.scores if score.error is None]
    values = iter(advantage(graded) if graded else ())
    return [
        to_sample(group.rollout.prompt, completion, next(values) if score.error is None else None)
        for completion, score in zip(group.rollout.completions, group.scores, strict=True)
    ]


def to_sample(prompt: Prompt, completion: Completion, advantage: float | None) -> Sample:
    """Prompt and answer as one stream; ``None`` as advantage means that nothing is to be learned from this answer."""
    num_prompt, num_completion = len(prompt.token_ids), len(completion.token_ids)
    silence = np.zeros(num_prompt, np.float32)
    return Sample(
        prompt_uid=prompt.uid,
        token_ids=np.concatenate([prompt.token_ids, completion.token_ids]),
        loss_mask=np.repeat([False, advantage is not None], [num_prompt, num_completion]),
        rollout_logprobs=np.concatenate([silence, completion.logprobs]),
        advantages=np.concatenate([silence, np.full(num_completion, advantage or 0.0, np.float32)]),
        routed_experts=completion.routed_experts,
    )


def publish(team: Team, version: int) -> TransferStats:
    """Carry the trainer's weights into the engines, where they are called ``version`` from now on."""
    team.policy.wake("weights")
    with team.trainer.weights_resident():
        stats = team.trainer.send_weights(version)
    team.policy.wake("kv_cache")
    return stats


def ask_again(team: Team, page: Page, prompts: Sequence[Prompt], state: RunState) -> list[Sample]:
    """Send the weights anew and answer these prompts once more, to see whether the engines then agree."""
    publish(team, version=state.policy_version)
    seeds = team.seeds(state.episode + 1, "rollout")
    rollouts = team.policy.rollouts(prompts, team.completions_per_prompt, team.sampling, seeds, page.progress)
    team.policy.sleep()
    return [to_sample(group.prompt, completion, 0.0) for group in rollouts for completion in group.completions]


def evaluate(team: Team, page: Page, episode: int) -> None:
    """Answer every evaluation prompt with the evaluation's own sampling and random streams."""
    if not team.evaluation_prompts:
        return
    with page.phase("evaluate"):
        seeds = team.seeds(episode, "evaluation")
        rollouts = team.policy.rollouts(
            team.evaluation_prompts, team.evaluation_completions, team.evaluation_sampling, seeds, page.progress
        )
        page.add(describe_evaluation(team.graders.grade(rollouts)))
