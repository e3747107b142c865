"""Numbers worth reading, from records. Where the original ChatLearn has a name for one, both names get one value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, isfinite, nan
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from chatlearn.records import Graded, StepStats

# A score of this or more is a solved problem, one of this or less an unsolved one; rule rewards lie between the two.
SOLVED = 1.0
UNSOLVED = 0.0

# Phases that the original timed as one, by its name for them.
ORIGINAL_TIMERS: Mapping[str, tuple[str, ...]] = {
    "episode": ("time/episode",),
    "environment": ("time/rollout", "time/reward", "time/reference", "time/old_logprobs"),
    "train": ("time/train",),
    "sync_parameters": ("time/publish",),
    "save_checkpoint": ("time/save",),
    "evaluate": ("time/evaluate",),
}

# What the clock and the machine say of a run: whole groups of names, last letters of names, and single names.
MEASURED_GROUPS = ("time", "checkpoint", "engine/timer_summary")
MEASURED_UNITS = ("seconds", "_s", "_gb", "mfu")
MEASURED_COUNTS = ("rollout/replaced_engines", "rule_reward/replaced_graders")
# Groups in which users name things: data sources, and the parts of their rewards.
NAMED_BY_USERS = ("rule_reward", "eval")


class Transfer(Protocol):
    """What one weight transfer tells of itself."""

    @property
    def version(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def checksum_s(self) -> float: ...

    @property
    def seconds(self) -> float: ...


def is_measured(name: str) -> bool:
    """Whether a number is the machine's (seconds, speed, memory, processes that died), and not what was computed.

    Two runs that compute the same to the bit have all other numbers alike.

    >>> is_measured("rollout/tokens_per_s"), is_measured("rollout/reward_mean")
    (True, False)
    """
    if name in MEASURED_COUNTS or any(f"{name}/".startswith(f"{group}/") for group in MEASURED_GROUPS):
        return True
    return not name.startswith(NAMED_BY_USERS) and name.endswith(MEASURED_UNITS)


def describe_rollouts(graded: Sequence[Graded]) -> dict[str, float]:
    """Lengths, rewards and grader errors of one episode's rollouts.

    Lengths are over all completions. Rewards are over those that could be graded; a group none of whose completions
    could be graded is neither solved nor unsolved, and without any graded completion the reward numbers are absent.
    """
    completions = [completion for group in graded for completion in group.rollout.completions]
    if not completions:
        return {}
    lengths = np.array([len(completion.token_ids) for completion in completions])
    num_prompt_tokens = sum(len(group.rollout.prompt.token_ids) * len(group.rollout.completions) for group in graded)
    mean_length = float(lengths.mean())
    truncated_ratio = share(completion.finish_reason == "length" for completion in completions)
    return {
        "rollout/response_length_mean": mean_length,
        "rollout/response_token_length": mean_length,
        "rollout/prompt_token_length": num_prompt_tokens / len(completions),
        "rollout/response_max": float(lengths.max()),
        **{f"rollout/response_{rank}_percentile": float(np.percentile(lengths, rank)) for rank in (25, 50, 75)},
        "rollout/truncated_ratio": truncated_ratio,
        "rollout/response_clip_ratio": truncated_ratio,
        "rollout/response_tokens": float(lengths.sum()),
        "rollout/prompt_tokens": float(num_prompt_tokens),
        **describe_scores(graded),
    }


def describe_versions(graded: Sequence[Graded], trained: int) -> dict[str, float]:
    """How many versions older than ``trained``, the weights that learn from them, the tokens of answers are."""
    runs = [run for group in graded for answer in group.rollout.completions for run in answer.versions]
    num_tokens = sum(run.num_tokens for run in runs)
    if num_tokens == 0:
        return {}
    total = sum((trained - run.version) * run.num_tokens for run in runs)
    return {
        "rollout/staleness_mean": total / num_tokens,
        "rollout/staleness_max": float(max(trained - run.version for run in runs)),
    }


def describe_scores(graded: Sequence[Graded]) -> dict[str, float]:
    """What the rewards say, and on how many completions the grader itself failed."""
    scores = [score for group in graded for score in group.scores]
    numbers = {"rule_reward/grader_errors": float(sum(score.error is not None for score in scores))}
    groups = graded_groups(graded)
    if not groups:
        return numbers
    rewards = np.concatenate(groups)
    mean, solved = float(rewards.mean()), share(bool(values.min() >= SOLVED) for values in groups)
    unsolved = share(bool(values.max() <= UNSOLVED) for values in groups)
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for score in scores:
        for name, value in score.parts.items() if score.error is None else ():
            parts[name].append(value)
    return numbers | {
        "rollout/reward_mean": mean,
        "rule_reward/train_reward_score": mean,
        "rollout/reward_std": float(rewards.std()),
        "rollout/solve_all_ratio": solved,
        "advantage_compute/all_correct_ratio": solved,
        "rollout/solve_none_ratio": unsolved,
        "advantage_compute/all_wrong_ratio": unsolved,
        **{f"rule_reward/{name}": float(np.mean(values)) for name, values in sorted(parts.items())},
    }


def describe_evaluation(graded: Sequence[Graded]) -> dict[str, float]:
    """Per data source: mean score, pass@k, lengths; ``avg@k`` carries the number of completions it was taken with.

    Completions that the grader failed on count neither for nor against; ``grader_errors`` tells how many they are.
    """
    by_source: defaultdict[str, list[Graded]] = defaultdict(list)
    for group in graded:
        by_source[group.rollout.prompt.source].append(group)
    numbers: dict[str, float] = {}
    for source, groups in sorted(by_source.items()):
        numbers |= describe_source(source, groups)
    return numbers


def grades(source: str, num_samples: int) -> list[str]:
    """Names of the evaluation numbers of a data source that are better the higher they are.

    >>> grades("arithmetic", 2)
    ['eval/arithmetic/avg@2', 'eval/eval_arithmetic', 'eval/arithmetic/pass@1', 'eval/arithmetic/pass@2']
    """
    names = [f"eval/{source}/avg@{num_samples}", f"eval/eval_{source}"]
    return names + [f"eval/{source}/pass@{k}" for k in pass_at(num_samples)]


def describe_source(source: str, graded: Sequence[Graded]) -> dict[str, float]:
    """The evaluation numbers of one data source."""
    completions = [completion for group in graded for completion in group.rollout.completions]
    num_samples = max(len(group.scores) for group in graded)
    numbers = {
        f"eval/{source}/grader_errors": float(
            sum(score.error is not None for group in graded for score in group.scores)
        ),
        f"eval/eval_{source}_response_length": float(np.mean([len(answer.token_ids) for answer in completions])),
        f"eval/eval_{source}_response_clip_ratio": share(answer.finish_reason == "length" for answer in completions),
    }
    groups = graded_groups(graded)
    if groups:
        # A mean of means: every prompt weighs the same, also where the grader failed on some of its completions.
        mean = float(np.mean([values.mean() for values in groups]))
        numbers |= {f"eval/{source}/avg@{num_samples}": mean, f"eval/eval_{source}": mean}
    for k in pass_at(num_samples):
        chances = [pass_chance(values.size, int((values >= SOLVED).sum()), k) for values in groups if values.size >= k]
        if chances:
            numbers[f"eval/{source}/pass@{k}"] = float(np.mean(chances))
    return numbers


def pass_at(num_samples: int) -> list[int]:
    """The k to report: powers of two, and the number of samples itself.

    >>> pass_at(12)
    [1, 2, 4, 8, 12]
    """
    powers = [2**exponent for exponent in range(num_samples.bit_length()) if 2**exponent < num_samples]
    return [*powers, num_samples]


def pass_chance(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that at least one of ``k`` of the samples, drawn without replacement, is correct.

    The unbiased estimator of pass@k of Chen et al., "Evaluating Large Language Models Trained on Code"
    (arXiv:2107.03374), in exact integers.

    >>> pass_chance(num_samples=4, num_correct=1, k=2)
    0.5
    """
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def describe_steps(steps: Sequence[StepStats]) -> dict[str, float]:
    """The optimizer steps of an episode as one: means weighted by loss tokens, sums of tokens, the last rate.

    A gradient norm belongs to a step and not to a token, so its mean is over steps, without those that were skipped
    because theirs was not finite.
    """
    if not steps:
        return {}
    weights = np.array([step.num_loss_tokens for step in steps], dtype=float)
    weights = weights / weights.sum() if weights.any() else np.full(len(steps), 1 / len(steps))

    def mean(values: Iterable[float]) -> float:
        return float(np.dot(weights, np.fromiter(values, dtype=float)))

    entropy = mean(step.entropy for step in steps)
    norms = [step.grad_norm for step in steps if isfinite(step.grad_norm)]
    numbers = {
        "policy_trainer/loss": mean(step.loss for step in steps),
        "policy_trainer/pg_loss": mean(step.pg_loss for step in steps),
        "policy_trainer/kl_loss": mean(step.kl_loss for step in steps),
        "policy_trainer/entropy": entropy,
        "policy_trainer/entropy_loss": entropy,
        "policy_trainer/grad_norm": float(np.mean(norms)) if norms else nan,
        "policy_trainer/clip_fraction": mean(step.clip_fraction for step in steps),
        "policy_trainer/lr": steps[-1].lr,
        "policy_trainer/tokens": float(sum(step.num_tokens for step in steps)),
        "policy_trainer/loss_tokens": float(sum(step.num_loss_tokens for step in steps)),
        "policy_trainer/steps": float(len(steps)),
        "policy_trainer/skipped_steps": float(len(steps) - len(norms)),
        "numerics/rollout_logprob_diff_mean": mean(step.rollout_logprob_diff_mean for step in steps),
        "numerics/rollout_logprob_diff_max": max(step.rollout_logprob_diff_max for step in steps),
        "numerics/rollout_kl": mean(step.rollout_kl for step in steps),
    }
    optional = {
        "numerics/router_agreement": [step.router_agreement for step in steps],
        "rollout_correction/ess": [step.correction_ess for step in steps],
        "rollout_correction/masked_ratio": [step.correction_masked_ratio for step in steps],
        "rollout_correction/weight_mean": [step.correction_weight_mean for step in steps],
    }
    for name, values in optional.items():
        told = [value for value in values if value is not None]
        if told:
            numbers[name] = float(np.mean(told))
    return numbers


def describe_transfer(transfer: Transfer) -> dict[str, float]:
    """How long the weights took to reach the engines, and how fast that was."""
    numbers = {
        "sync/version": float(transfer.version),
        "sync/seconds": transfer.seconds,
        "sync/checksum_seconds": transfer.checksum_s,
    }
    if transfer.seconds > 0:
        numbers["sync/gigabytes_per_s"] = transfer.num_bytes / 1e9 / transfer.seconds
    return numbers


@dataclass(frozen=True)
class Capacity:
    """The trainer's hardware and model: operations per token of a step, all ranks' peak operations per second
    (``None`` where it is not known), and the most memory that a rank has held."""

    flops_per_token: float
    peak_flops: float | None
    peak_memory_gb: float


def describe_use(metrics: Mapping[str, float], capacity: Capacity | None) -> dict[str, float]:
    """Memory, and model FLOPs utilisation as PaLM defines it (arXiv:2204.02311); absent where the peak is unknown."""
    if capacity is None:
        return {}
    numbers = {"policy_trainer/memory_gb": capacity.peak_memory_gb}
    seconds = metrics.get("time/train", 0.0)
    if capacity.peak_flops is not None and seconds > 0 and "policy_trainer/tokens" in metrics:
        achieved = capacity.flops_per_token * metrics["policy_trainer/tokens"] / seconds
        numbers["policy_trainer/mfu"] = achieved / capacity.peak_flops
    return numbers


def derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """Numbers that follow from others of the same episode: speeds, and the original's names for times."""
    numbers: dict[str, float] = {}
    for name, phases in ORIGINAL_TIMERS.items():
        seconds = [metrics[phase] for phase in phases if phase in metrics]
        if seconds:
            numbers[f"engine/timer_summary/{name}"] = sum(seconds)
    if "rollout/response_tokens" in metrics and metrics.get("rollout/engine_busy_s", 0) > 0:
        numbers["rollout/tokens_per_s"] = metrics["rollout/response_tokens"] / metrics["rollout/engine_busy_s"]
    if "rollout/response_tokens" in metrics and metrics.get("time/episode", 0) > 0:
        num_tokens = metrics["rollout/prompt_tokens"] + metrics["rollout/response_tokens"]
        numbers["engine/timer_summary/tps_throughput"] = num_tokens / metrics["time/episode"]
    return numbers


def graded_groups(graded: Sequence[Graded]) -> list[NDArray[np.float64]]:
    """The scores of each group's completions that could be graded; groups without any are left out."""
    groups = [np.array([score.value for score in group.scores if score.error is None]) for group in graded]
    return [values for values in groups if values.size]


def share(flags: Iterable[bool]) -> float:
    """The share of True."""
    return float(np.mean(list(flags)))
