"""Which loop a configuration asks for, and whether engines and trainer work at the same time in it."""

from __future__ import annotations

from math import isclose
from typing import Final, Literal

from chatlearn.config.schema import GrpoConfig

PARTIAL: Final = "models.partial_rollout_manager"

ScheduleName = Literal["sync", "over_sampling", "partial_rollout", "one_step_off", "async"]


def schedule_name(config: GrpoConfig) -> ScheduleName:
    """The loop; over-sampling and partial rollout are variants of the synchronous one."""
    runtime = config.runtime_args
    if runtime.use_partial_rollout:
        return "partial_rollout"
    if runtime.over_sampling_ratio > 1:
        return "over_sampling"
    return runtime.schedule


def works_at_once(config: GrpoConfig) -> bool:
    """Whether engines answer while the trainer learns, so that neither can have what the other one uses."""
    return config.runtime_args.schedule != "sync"


def schedule_problems(config: GrpoConfig) -> list[str]:
    """What about the schedule cannot be done, or would have no effect."""
    runtime = config.runtime_args
    asked = {
        f"runtime_args.use_partial_rollout={runtime.use_partial_rollout}": runtime.use_partial_rollout,
        f"runtime_args.over_sampling_ratio={runtime.over_sampling_ratio}": runtime.over_sampling_ratio > 1,
    }
    written = [what for what, is_asked in asked.items() if is_asked]
    problems = [
        f"{what} goes with runtime_args.schedule=sync, not with {runtime.schedule}; leave one of them out"
        for what in written
        if runtime.schedule != "sync"
    ]
    if len(written) > 1:
        problems.append(f"{' and '.join(written)} exclude each other: both are ways not to wait for long answers")
    if runtime.schedule != "async" and runtime.max_staleness != type(runtime).model_fields["max_staleness"].default:
        problems.append(
            f"runtime_args.max_staleness={runtime.max_staleness} has no effect with "
            f"runtime_args.schedule={runtime.schedule}; leave it out, or set runtime_args.schedule=async"
        )
    return problems + (_partial_problems(config) if runtime.use_partial_rollout else [])


def _partial_problems(config: GrpoConfig) -> list[str]:
    partial, policy = config.models.partial_rollout_manager, config.models.policy
    ratio = f"{PARTIAL}.rollout_ratio=[{', '.join(map(str, partial.rollout_ratio))}]"
    problems: list[str] = []
    if len(partial.rollout_ratio) != partial.max_rollout_round:
        problems.append(f"{ratio} must have one share for each of max_rollout_round={partial.max_rollout_round} rounds")
    if not isclose(sum(partial.rollout_ratio), 1.0, abs_tol=1e-6):
        problems.append(f"{ratio} must add up to 1, not to {sum(partial.rollout_ratio):.6g}")
    elif min(partial.rollout_ratio) * policy.max_response_tokens_length < 1:
        problems.append(f"{ratio} leaves a round less than one token of max_response_tokens_length; use larger shares")
    if partial.mini_response_per_prompt >= policy.num_inference_per_prompt:
        problems.append(
            f"{PARTIAL}.mini_response_per_prompt={partial.mini_response_per_prompt} must be less than "
            f"models.policy.num_inference_per_prompt={policy.num_inference_per_prompt}"
        )
    if policy.presence_penalty != 0 or policy.frequency_penalty != 0:
        problems.append(
            "models.policy.presence_penalty and models.policy.frequency_penalty count the tokens of one round only; "
            "leave them out with runtime_args.use_partial_rollout"
        )
    return problems
