"""Every answer is asked for once and comes back to its prompt, whatever the order; seeds never collide."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.errors import RunError
from chatlearn.records import Completion, Prompt, VersionRun
from chatlearn.rollout.dispatch import assemble, engine_seed, plan_dispatch, request_id
from chatlearn.rollout.engine import Finished


def make_prompts(count: int) -> list[Prompt]:
    # Two prompts share a uid, as when a batch reaches round the end of a small data set.
    return [
        Prompt(f"uid{i % 3}", np.asarray([i, i + 1], dtype=np.int32), f"text{i}", "source", "1") for i in range(count)
    ]


def make_finished(name: str) -> Finished:
    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), name, "stop", (VersionRun(0, 1),))
    return Finished(name, completion)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(num_prompts=st.integers(0, 12), answers=st.integers(1, 5), replicas=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_request_is_accounted_for_exactly_once(num_prompts: int, answers: int, replicas: int, seed: int) -> None:
    prompts = make_prompts(num_prompts)
    plan = plan_dispatch(prompts, answers, replicas)
    names = [request.request_id for share in plan for request in share]
    assert len(set(names)) == len(names) == num_prompts * answers

    random.Random(seed).shuffle(names)
    rollouts = assemble(prompts, answers, map(make_finished, names))
    assert [rollout.prompt for rollout in rollouts] == prompts
    for position, rollout in enumerate(rollouts):
        assert [c.text for c in rollout.completions] == [request_id(position, answer) for answer in range(answers)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(num_prompts=st.integers(0, 12), answers=st.integers(1, 5), replicas=st.integers(1, 5))
def test_replicas_are_balanced_and_answers_of_a_prompt_lie_together(
    num_prompts: int, answers: int, replicas: int
) -> None:
    plan = plan_dispatch(make_prompts(num_prompts), answers, replicas)
    sizes = [len(share) for share in plan]
    assert len(plan) == replicas
    assert max(sizes) - min(sizes) <= answers
    for share in plan:
        for start in range(0, len(share), answers):
            group = share[start : start + answers]
            assert len({request.request_id.split(".")[0] for request in group}) == 1
            assert all(np.array_equal(request.prompt_token_ids, group[0].prompt_token_ids) for request in group)


def test_lost_doubled_and_invented_answers_are_errors() -> None:
    prompts = make_prompts(2)
    names = [request_id(position, answer) for position in range(2) for answer in range(2)]
    with pytest.raises(RunError, match=r"left out 1 requests \['1.1'\]"):
        assemble(prompts, 2, map(make_finished, names[:-1]))
    with pytest.raises(RunError, match=r"0\.0 twice"):
        assemble(prompts, 2, map(make_finished, [*names, "0.0"]))
    with pytest.raises(RunError, match=r"made up \['9.9'\]"):
        assemble(prompts, 2, map(make_finished, [*names, "9.9"]))


def test_seeds_depend_on_run_episode_replica_and_purpose_and_on_nothing_else() -> None:
    keys = list(product((0, 1234), range(1, 20), range(4), ("rollout", "evaluation")))
    seeds = [engine_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [engine_seed(*key) for key in keys]
    assert all(0 <= seed < 2**32 for seed in seeds)
