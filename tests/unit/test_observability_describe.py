"""The numbers, by hand and by law."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import isnan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.observability.describe import (
    derived,
    describe_evaluation,
    describe_rollouts,
    describe_steps,
    describe_transfer,
    describe_versions,
    pass_at,
    pass_chance,
)
from chatlearn.records import Completion, Graded, Prompt, Rollout, Score, StepStats, VersionRun

laws = settings(max_examples=60, deadline=None, derandomize=True)


def group_of(
    scores: Sequence[Score], lengths: Sequence[int], source: str = "arithmetic", num_prompt: int = 4
) -> Graded:
    """A group whose completions longer than 9 tokens were truncated."""
    completions = tuple(
        Completion(
            token_ids=np.zeros(length, np.int32),
            logprobs=np.zeros(length, np.float32),
            text="",
            finish_reason="length" if length > 9 else "stop",
            versions=(VersionRun(1, length),),
        )
        for length in lengths
    )
    prompt = Prompt(uid="p", token_ids=np.zeros(num_prompt, np.int32), text="", source=source, answer="")
    return Graded(Rollout(prompt, completions), tuple(scores))


RIGHT, WRONG, BROKEN = Score(1.0), Score(0.0), Score(0.0, error="deadline")


def test_rollout_numbers_by_hand() -> None:
    numbers = describe_rollouts(
        [
            group_of([RIGHT, RIGHT], [2, 4], num_prompt=3),
            group_of([WRONG, RIGHT], [6, 10], num_prompt=5),
            group_of([WRONG, WRONG], [8, 12], num_prompt=5),
            group_of([BROKEN, RIGHT], [1, 5], num_prompt=5),
        ]
    )
    assert numbers["rollout/response_length_mean"] == 6.0
    assert numbers["rollout/response_max"] == 12.0
    assert numbers["rollout/response_50_percentile"] == 5.5
    assert numbers["rollout/prompt_token_length"] == 4.5
    assert numbers["rollout/truncated_ratio"] == 0.25
    assert numbers["rollout/response_tokens"] == 48
    assert numbers["rollout/prompt_tokens"] == 36
    assert numbers["rollout/reward_mean"] == pytest.approx(4 / 7)
    assert numbers["rollout/reward_std"] == pytest.approx(np.std([1, 1, 0, 1, 0, 0, 1]))
    assert numbers["rollout/solve_all_ratio"] == 0.5
    assert numbers["rollout/solve_none_ratio"] == 0.25
    assert numbers["rule_reward/grader_errors"] == 1


def test_names_of_the_original_carry_the_same_values() -> None:
    numbers = describe_rollouts([group_of([RIGHT, WRONG, RIGHT], [3, 10, 4]), group_of([WRONG, WRONG], [3, 9])])
    pairs = {
        "rollout/response_token_length": "rollout/response_length_mean",
        "rollout/response_clip_ratio": "rollout/truncated_ratio",
        "rule_reward/train_reward_score": "rollout/reward_mean",
        "advantage_compute/all_correct_ratio": "rollout/solve_all_ratio",
        "advantage_compute/all_wrong_ratio": "rollout/solve_none_ratio",
    }
    for original, ours in pairs.items():
        assert numbers[original] == numbers[ours]
    assert {"rollout/prompt_token_length", "rollout/response_25_percentile", "rollout/response_75_percentile"} <= set(
        numbers
    )


def test_named_parts_of_the_reward_are_averaged_over_what_was_graded() -> None:
    scores = [Score(1.0, {"format": 1.0}), Score(0.0, {"format": 0.0}), Score(0.0, {"format": 9.0}, error="crash")]
    assert describe_rollouts([group_of(scores, [1, 1, 1])])["rule_reward/format"] == 0.5


def test_without_a_graded_answer_there_is_no_reward_but_a_count_of_errors() -> None:
    numbers = describe_rollouts([group_of([BROKEN, BROKEN], [1, 2])])
    assert numbers["rule_reward/grader_errors"] == 2
    assert "rollout/reward_mean" not in numbers
    assert describe_rollouts([]) == {}


def test_evaluation_names_the_number_of_samples_and_keeps_sources_apart() -> None:
    maths = "DigitalLearningGmbH/MATH-lighteval"
    numbers = describe_evaluation(
        [
            group_of([RIGHT, WRONG, WRONG, WRONG], [1, 2, 3, 10], source=maths),
            group_of([RIGHT, RIGHT, RIGHT, RIGHT], [1, 1, 1, 1], source=maths),
            group_of([WRONG], [5], source="openai/gsm8k"),
        ]
    )
    assert numbers[f"eval/{maths}/avg@4"] == numbers[f"eval/eval_{maths}"] == 0.625
    assert numbers[f"eval/{maths}/pass@1"] == pytest.approx(0.625)
    assert numbers[f"eval/{maths}/pass@2"] == pytest.approx(0.75)
    assert numbers[f"eval/{maths}/pass@4"] == 1.0
    assert numbers[f"eval/eval_{maths}_response_length"] == 2.5
    assert numbers[f"eval/eval_{maths}_response_clip_ratio"] == 0.125
    assert numbers["eval/openai/gsm8k/avg@1"] == numbers["eval/openai/gsm8k/pass@1"] == 0.0


def test_a_grader_error_in_an_evaluation_is_not_a_wrong_answer() -> None:
    numbers = describe_evaluation([group_of([RIGHT, BROKEN], [1, 1], source="s")])
    assert numbers["eval/s/avg@2"] == 1.0
    assert numbers["eval/s/grader_errors"] == 1
    assert "eval/s/pass@2" not in numbers


@laws
@given(st.integers(1, 9), st.data())
def test_pass_chance_is_the_share_of_draws_with_a_correct_one(num_samples: int, data: st.DataObject) -> None:
    num_correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    draws = list(itertools.combinations([True] * num_correct + [False] * (num_samples - num_correct), k))
    assert pass_chance(num_samples, num_correct, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_ends_with_the_number_of_samples() -> None:
    assert [pass_at(count) for count in (1, 2, 8, 12)] == [[1], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def step_of(num_loss_tokens: int, value: float) -> StepStats:
    numbers = {entry.name: value for entry in fields(StepStats)}
    return StepStats(**{**numbers, "num_tokens": 2 * num_loss_tokens, "num_loss_tokens": num_loss_tokens})


def test_steps_are_merged_by_their_loss_tokens() -> None:
    numbers = describe_steps([step_of(300, 1.0), replace(step_of(100, 5.0), lr=0.25)])
    for name in ("loss", "pg_loss", "kl_loss", "entropy", "entropy_loss", "clip_fraction"):
        assert numbers[f"policy_trainer/{name}"] == pytest.approx(2.0)
    assert numbers["policy_trainer/grad_norm"] == 3.0
    assert numbers["policy_trainer/lr"] == 0.25
    assert numbers["policy_trainer/tokens"] == 800
    assert numbers["policy_trainer/loss_tokens"] == 400
    assert numbers["numerics/rollout_logprob_diff_mean"] == numbers["numerics/rollout_kl"] == pytest.approx(2.0)
    assert numbers["numerics/rollout_logprob_diff_max"] == 5.0
    assert describe_steps([]) == {}


def test_a_skipped_step_is_counted_and_its_norm_is_nobodys() -> None:
    skipped = replace(step_of(100, 1.0), grad_norm=float("inf"))
    numbers = describe_steps([step_of(100, 3.0), skipped])
    assert numbers["policy_trainer/grad_norm"] == 3.0
    assert numbers["policy_trainer/skipped_steps"] == 1.0
    assert isnan(describe_steps([skipped])["policy_trainer/grad_norm"])


def test_router_agreement_is_there_where_an_engine_told_its_choices() -> None:
    told, untold = step_of(100, 0.5), replace(step_of(100, 0.5), router_agreement=None)
    assert describe_steps([told, untold])["numerics/router_agreement"] == 0.5
    assert "numerics/router_agreement" not in describe_steps([untold])


def test_numbers_of_the_correction_are_there_where_one_is_on() -> None:
    step = replace(step_of(100, 1.0), correction_ess=0.9, correction_masked_ratio=0.1, correction_weight_mean=1.2)
    numbers = describe_steps([step])
    told = {name: value for name, value in numbers.items() if name.startswith("rollout_correction/")}
    assert told == {
        "rollout_correction/ess": 0.9,
        "rollout_correction/masked_ratio": 0.1,
        "rollout_correction/weight_mean": 1.2,
    }
    off = replace(step, correction_ess=None, correction_masked_ratio=None, correction_weight_mean=None)
    assert not any(name.startswith("rollout_correction/") for name in describe_steps([off]))


def test_steps_without_loss_tokens_do_not_divide_by_zero() -> None:
    assert describe_steps([step_of(0, 1.0), step_of(0, 3.0)])["policy_trainer/loss"] == 2.0


@dataclass(frozen=True)
class Carried:
    version: int
    num_bytes: int
    seconds: float
    checksum_s: float = 0.25


def test_transfer_speed_is_in_gigabytes() -> None:
    assert describe_transfer(Carried(version=7, num_bytes=3_000_000_000, seconds=2.0)) == {
        "sync/version": 7.0,
        "sync/seconds": 2.0,
        "sync/checksum_seconds": 0.25,
        "sync/gigabytes_per_s": 1.5,
    }
    assert "sync/gigabytes_per_s" not in describe_transfer(Carried(version=7, num_bytes=1, seconds=0.0))


def test_speeds_and_the_timers_of_the_original_follow_from_the_phases() -> None:
    times = {"time/episode": 20.0, "time/rollout": 8.0, "time/reward": 1.0, "time/train": 6.0, "time/publish": 0.5}
    tokens = {"rollout/response_tokens": 4000.0, "rollout/prompt_tokens": 1000.0, "rollout/engine_busy_s": 8.0}
    numbers = derived(times | tokens)
    assert numbers == {
        "engine/timer_summary/episode": 20.0,
        "engine/timer_summary/environment": 9.0,
        "engine/timer_summary/train": 6.0,
        "engine/timer_summary/sync_parameters": 0.5,
        "rollout/tokens_per_s": 500.0,
        "engine/timer_summary/tps_throughput": 250.0,
    }


def test_staleness_counts_tokens_from_the_weights_that_learn_from_them() -> None:
    def answer(*runs: VersionRun) -> Completion:
        num_tokens = sum(run.num_tokens for run in runs)
        return Completion(np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.float32), "", "stop", runs)

    completions = (answer(VersionRun(4, 6)), answer(VersionRun(2, 1), VersionRun(3, 1)))
    group = Graded(Rollout(group_of([], []).rollout.prompt, completions), (Score(0.0), Score(0.0)))
    numbers = describe_versions([group], trained=4)
    assert numbers == {"rollout/staleness_mean": pytest.approx((2 + 1) / 8), "rollout/staleness_max": 2.0}
    assert describe_versions([], trained=4) == {}
