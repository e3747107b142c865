"""Judges rollouts: chooses the reward function by data source and runs it in processes with a deadline."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from chatlearn.config.resolve import resolve
from chatlearn.errors import ConfigError
from chatlearn.records import Completion, Graded, Prompt, Rollout
from chatlearn.reward.boxed_math import boxed_math, gold_math
from chatlearn.reward.grader_pool import GraderPool
from chatlearn.reward.grader_process import RewardFn, Task

# By data source; ``boxed_math`` is there to be chosen by name for data of one's own.
REWARDS: Mapping[str, RewardFn] = {
    "DigitalLearningGmbH/MATH-lighteval": boxed_math,
    "openai/gsm8k": boxed_math,
    "aime24": boxed_math,
    "aime25": boxed_math,
    "boxed_math": boxed_math,
}

DEADLINE_S = 10.0  # the slowest honest answer of MATH's test split took 1.5 s on a busy machine


def dotted_name(function: Callable[..., object]) -> str:
    """``package.module:function``, by which another process can import it."""
    return f"{function.__module__}:{function.__qualname__}"


def reward_name(source: str, reward: str | None) -> str:
    """The reward function for a data source; ``reward`` is what ``models.reward.function`` says, if anything."""
    if reward is not None:
        return reward if ":" in reward else dotted_name(resolve(REWARDS, reward, "models.reward.function"))
    if source not in REWARDS:
        raise ConfigError(
            f"no reward function for data source '{source}'; set models.reward.function=package.module:function"
        )
    return dotted_name(REWARDS[source])


def require_rewards(sources: Iterable[str], reward: str | None) -> None:
    """Check that every data source has a reward function; all that have none are named in one error."""
    problems: dict[str, None] = {}
    for source in sorted(set(sources)):
        try:
            reward_name(source, reward)
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise ConfigError(*problems)


def gold_prompts(prompts: Sequence[Prompt], reward: str | None) -> list[Prompt]:
    """The prompts that the mathematics reward judges; nobody knows how a right answer looks to another one."""
    return [prompt for prompt in prompts if reward_name(prompt.source, reward) == dotted_name(boxed_math)]


class Grader:
    """Some processes that judge answers. Use it from one thread, and close it.

    ``reward`` is ``package.module:function``, a name of ``REWARDS``, or ``None`` for a choice by data source. An answer
    on which the function takes longer than ``deadline_s`` or raises, or under which its process dies twice, gets a
    score with ``error``; no other answer suffers from it.
    """

    def __init__(self, reward: str | None = None, deadline_s: float = DEADLINE_S, num_processes: int = 1) -> None:
        self._reward = reward
        rewards = REWARDS.values() if reward is None else ()
        names = {dotted_name(function) for function in rewards} or {reward_name("", reward)}
        preloaded = ["math_verify"] if dotted_name(boxed_math) in names else []
        self._pool = GraderPool(sorted(names | {dotted_name(gold_math)}), preloaded, deadline_s, num_processes)

    @property
    def pids(self) -> tuple[int, ...]:
        """The ids of its processes."""
        return self._pool.pids

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """Judge every completion; scores stand in the order of the completions."""
        tasks = [
            Task(reward_name(rollout.prompt.source, self._reward), rollout.prompt, completion)
            for rollout in rollouts
            for completion in rollout.completions
        ]
        scores = iter(self._pool.judge(tasks))
        return [Graded(rollout, tuple(itertools.islice(scores, len(rollout.completions)))) for rollout in rollouts]

    def grade_gold(self, prompts: Sequence[Prompt]) -> list[str]:
        """Try gold answers as if a model had given them; returns a line for each that is not recognised.

        Of ``prompts`` only ``gold_prompts`` are tried.
        """
        chosen = gold_prompts(prompts, self._reward)
        scores = self._pool.judge([Task(dotted_name(gold_math), prompt, _gold_completion(prompt)) for prompt in chosen])
        return [
            f"{prompt.uid}: {prompt.answer!r:.80}: {score.error or 'is not recognised as itself'}"
            for prompt, score in zip(chosen, scores, strict=True)
            if score.error or score.value < 1.0
        ]

    def close(self) -> None:
        """End all processes."""
        self._pool.close()


def from_compute_score(compute_score: Callable[[str, str], float]) -> RewardFn:
    """Make a reward function of one that takes the answer's text and the ground truth.

    In a module of your own: ``reward = from_compute_score(compute_score)``; then
    ``models.reward.function=package.module:reward``.
    """

    def reward(prompt: Prompt, completion: Completion) -> float:
        return compute_score(completion.text, prompt.answer)

    return reward


def _gold_completion(prompt: Prompt) -> Completion:
    """What a model would say that knows the gold answer and nothing else."""
    nothing = np.zeros(0)
    text = rf"\boxed{{{prompt.answer}}}"
    return Completion(nothing.astype(np.int32), nothing.astype(np.float32), text, "stop", ())
