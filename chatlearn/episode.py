"""What every schedule makes an episode of: judge answers, learn from them, publish the weights, evaluate.

A schedule decides when answers are asked for and which of them an episode learns from; what is done with them is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import ClassVar, Protocol

import numpy as np

from chatlearn.algorithm.advantage import AdvantageFn
from chatlearn.checkpoint.capsule import BAD_STEP, INTERVAL, CapsuleFacts
from chatlearn.checkpoint.run_state import RunState
from chatlearn.config.schedule import ScheduleName
from chatlearn.data.stream import StreamPosition
from chatlearn.gate import check_numerics
from chatlearn.observability.describe import describe_evaluation, describe_rollouts, describe_versions
from chatlearn.observability.journal import Page
from chatlearn.records import Completion, Graded, OpenGroup, Prompt, Sample, Score, StepStats
from chatlearn.saving import begin_capsule, finish_capsule, is_due, require_finite_steps
from chatlearn.team import Team
from chatlearn.weights.wire import TransferStats


class Schedule(Protocol):
    """One way to take turns between engines and trainer."""

    name: ClassVar[ScheduleName]

    def live(self, page: Page, state: RunState, episode: int) -> RunState:
        """One episode, from answers to published weights; returns where the next one begins."""
        ...


def judge(team: Team, page: Page, graded: Sequence[Graded], episode: int) -> list[Sample]:
    """Graded answers as samples, each compared with its siblings; what there is to tell of them goes on the page."""
    samples = [sample for group in graded for sample in compare(group, team.advantage)]
    tell_of(team, page, graded, samples, episode)
    return samples


def tell_of(team: Team, page: Page, graded: Sequence[Graded], samples: Sequence[Sample], episode: int) -> None:
    """Put the episode's answers on the page, and into its file."""
    page.add(describe_rollouts(graded))
    page.add(describe_versions(graded, trained=episode - 1))
    page.keep(graded, samples)
    page.add({"policy_trainer/oversized_samples": float(team.trainer.num_oversized(samples))})


def examine(team: Team, page: Page, state: RunState, graded: Sequence[Graded], samples: Sequence[Sample]) -> None:
    """Compare engine and trainer, before anything is learned; a run does so once, and once more after each resume."""
    with page.phase("numerics"):
        rollouts = [group.rollout for group in graded]
        check_numerics(team, page, state, rollouts, samples, lambda some: ask_again(team, page, some, state))


def study(team: Team, page: Page, state: RunState, samples: list[Sample]) -> int:
    """Learn from an episode's samples; returns the number of optimizer steps."""
    episode = state.episode + 1
    if team.reference is not None:  # Absent when kl_coef is zero.
        with page.phase("reference"), team.reference.resident():
            samples = team.reference.annotate(samples)

    team.policy.current_version = None  # The trainer leaves the weights that the engines know.
    num_steps = 0
    team.trainer.reseed(team.args.seed, episode)  # After the comparison above, which only some episodes have.
    with page.phase("train"), team.trainer.resident():
        if team.layout.steps_per_episode > 1:  # With a single step the step itself computes them.
            with page.phase("old_logprobs"):
                samples = team.trainer.annotate(samples)
        for number, batch in enumerate(team.batches(samples, episode), start=1):
            page.add_step(learn(team, page, batch, episode, state.train_iteration + number))
            page.progress(number, team.layout.steps_per_episode)
            num_steps = number
    page.add_capacity(team.trainer.capacity())
    return num_steps


def learn(team: Team, page: Page, batch: Sequence[Sample], episode: int, iteration: int) -> StepStats:
    """One optimizer step. What it consumed is kept where that is asked for, and always when the step went wrong."""
    is_asked_for = is_due(iteration, team.args.capsule_interval)
    is_begun = is_asked_for and begin_capsule(team, page, iteration)
    stats = team.trainer.step(batch, iteration)
    went_wrong = not isfinite(stats.grad_norm)
    if went_wrong:
        page.say(f"step {iteration} was skipped on all ranks: the norm of its gradient is {stats.grad_norm}")
        if not is_asked_for:  # No rank has moved: the weights are still those that the step began with.
            is_begun = begin_capsule(team, page, iteration)
    if is_begun:
        reason = BAD_STEP if went_wrong else INTERVAL
        finish_capsule(
            team, page, batch, CapsuleFacts(iteration, episode, reason, team.layout.trainer.num_ranks, stats)
        )
    require_finite_steps(team, iteration)
    return stats


def compare(group: Graded, advantage: AdvantageFn, earlier: Sequence[Score] = ()) -> list[Sample]:
    """Tell every answer how it did beside its siblings, and beside ``earlier`` ones that were learned from before.

    An answer that the grader failed on is neither right nor wrong: it stays out of the comparison and out of the loss.
    """
    before = [score.value for score in earlier if score.error is None]
    graded = [score.value for score in group.scores if score.error is None]
    values = iter(advantage([*before, *graded])[len(before) :] if graded else ())
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
    """Carry the trainer's weights into the engines, where they are called ``version`` from now on.

    An engine that is lost on the way is replaced, and gets the same weights when it is there.
    """
    with team.policy.held():
        team.policy.wake("weights")
        with team.trainer.weights_resident():
            delivery = team.trainer.send_weights(version)
        team.policy.current_version = version
        team.policy.lose(delivery.lost)
        team.policy.wake("kv_cache")
    return delivery.stats


def ask_again(team: Team, page: Page, prompts: Sequence[Prompt], state: RunState) -> list[Sample]:
    """Send the weights anew and answer these prompts once more, to see whether the engines then agree."""
    publish(team, version=state.policy_version)
    asked = team.pipeline.ask_planned(prompts, team.asking, team.seeds(state.episode + 1, "rollout"))
    team.pipeline.await_answers(asked, page.progress)
    team.policy.sleep()
    return [
        to_sample(group.rollout.prompt, completion, 0.0)
        for group in team.pipeline.take(asked)
        for completion in group.rollout.completions
    ]


def ask_anew(team: Team, open_groups: Sequence[OpenGroup]) -> None:
    """Let the data begin with these prompts, which nobody can go on with; their answers so far are forgotten.

    Where something was learned from a prompt already, it has had its turn.
    """
    untouched = [group.prompt for group in open_groups if len(group.scores) <= len(group.finished)]
    team.prompts.give_back(untouched)


def evaluate(team: Team, page: Page, episode: int) -> dict[str, float]:
    """Answer every evaluation prompt with the evaluation's own sampling and random streams; returns what came out."""
    if not team.evaluation_prompts:
        return {}
    with page.phase("evaluate"):
        seeds = team.seeds(episode, "evaluation")
        asked = team.pipeline.ask_planned(team.evaluation_prompts, team.evaluation_asking, seeds)
        team.pipeline.await_answers(asked, page.progress)
        numbers = describe_evaluation(team.pipeline.take(asked))
        page.add(numbers)
    return numbers


def state_after(
    state: RunState, num_steps: int, position: StreamPosition, open_groups: Sequence[OpenGroup] = ()
) -> RunState:
    """Where the next episode begins: this one counts, and its weights are published under its number."""
    return replace(
        state,
        episode=state.episode + 1,
        evaluation={} if num_steps > 0 else state.evaluation,  # Of the same weights it holds still.
        train_iteration=state.train_iteration + num_steps,
        policy_version=state.episode + 1,
        epoch=position.epoch,
        offset=position.offset,
        deferred=position.deferred,
        open_groups=tuple(open_groups),
    )
