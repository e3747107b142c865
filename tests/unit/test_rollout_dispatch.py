"""Every answer is asked for once and comes back to its prompt, whatever the order; seeds never collide."""

from __future__ import annotations

import random
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.errors import RunError
from chatlearn.records import Completion, Prompt, Rollout, VersionRun
from chatlearn.rollout.assembly import Assembly, request_ids
from chatlearn.rollout.dispatch import SamplingPurpose, engine_seed, plan_dispatch
from chatlearn.rollout.engine import Finished
from chatlearn.trainer.generators import GeneratorRole, generator_seeds, seed_generators

laws = settings(max_examples=50, deadline=None, derandomize=True)


def make_prompts(count: int) -> list[Prompt]:
    # Two prompts share a uid, as when a batch reaches round the end of a small data set.
    return [
        Prompt(f"uid{i % 3}", np.asarray([i, i + 1], dtype=np.int32), f"text{i}", "source", "1") for i in range(count)
    ]


def make_finished(name: str) -> Finished:
    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), name, "stop", (VersionRun(0, 1),))
    return Finished(name, completion)


@laws
@given(num_prompts=st.integers(0, 12), answers=st.integers(1, 5), replicas=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_request_is_accounted_for_exactly_once(num_prompts: int, answers: int, replicas: int, seed: int) -> None:
    prompts, assembly = make_prompts(num_prompts), Assembly()
    expected = [assembly.expect(prompt, answers) for prompt in prompts]
    plan = plan_dispatch([requests for _, requests in expected], replicas)
    names = [request.request_id for share in plan for request in share]
    assert len(set(names)) == len(names) == num_prompts * answers

    random.Random(seed).shuffle(names)
    whole: dict[int, Rollout] = {}
    for name in names:
        found = assembly.enter(make_finished(name))
        assert found is None or found[0] not in whole
        whole |= {} if found is None else dict([found])
    assert assembly.prompts() == {}
    assert [whole[number].prompt for number, _ in expected] == prompts
    for number, rollout in whole.items():
        assert [completion.text for completion in rollout.completions] == request_ids(number, answers)


@laws
@given(num_prompts=st.integers(0, 12), answers=st.integers(1, 5), replicas=st.integers(1, 5))
def test_replicas_are_balanced_and_answers_of_a_prompt_lie_together(
    num_prompts: int, answers: int, replicas: int
) -> None:
    assembly = Assembly()
    plan = plan_dispatch([assembly.expect(prompt, answers)[1] for prompt in make_prompts(num_prompts)], replicas)
    sizes = [len(share) for share in plan]
    assert len(plan) == replicas
    assert max(sizes) - min(sizes) <= answers
    for share in plan:
        for start in range(0, len(share), answers):
            group = share[start : start + answers]
            assert len({request.request_id.split(".")[0] for request in group}) == 1
            assert all(np.array_equal(request.prompt_token_ids, group[0].prompt_token_ids) for request in group)


def test_doubled_and_invented_answers_are_errors_and_missing_ones_are_known() -> None:
    assembly = Assembly()
    for prompt in make_prompts(2):
        assembly.expect(prompt, 2)
    assert assembly.enter(make_finished("0.0")) is None
    for name in ("0.0", "0.2", "9.9"):
        with pytest.raises(RunError, match=f"answered request {name}, which was answered before or never asked"):
            assembly.enter(make_finished(name))
    assert list(assembly.prompts()) == [0, 1]
    assert assembly.enter(make_finished("0.1")) is not None
    with pytest.raises(RunError, match="answered before"):
        assembly.enter(make_finished("0.1"))


@laws
@given(answers=st.integers(1, 6), answered=st.integers(0, 6), order=st.permutations(range(6)))
def test_a_group_is_taken_up_with_the_answers_it_has(answers: int, answered: int, order: list[int]) -> None:
    """In another life of the run, and there only what is missing is asked."""
    (prompt,), before, after = make_prompts(1), Assembly(), Assembly()
    before.expect(prompt, answers)
    answered = min(answered, answers - 1)
    for place in [place for place in order if place < answers][:answered]:
        before.enter(make_finished(f"0.{place}"))
    kept = before.open_groups()[0]
    assert [answer.text for answer in kept.finished] == sorted(answer.text for answer in kept.finished)
    after.expect(prompt, 1)
    number, requests, whole = after.take_up(kept.prompt, answers, kept.finished)
    assert (number, whole, len(requests)) == (1, None, answers - answered)
    *others, last = [make_finished(request.request_id) for request in requests]
    assert [after.enter(one) for one in others] == [None] * len(others)
    found = after.enter(last)
    assert found is not None
    assert found[1].completions[:answered] == kept.finished
    assert len(found[1].completions) == answers

    number, requests, whole = after.take_up(prompt, answers, found[1].completions)
    assert (requests, number) == ([], 2)
    assert whole is not None
    assert whole.completions == found[1].completions
    assert list(after.prompts()) == [0], "it is not waited for"


def test_the_answers_of_a_group_that_was_given_up_are_dropped_once() -> None:
    assembly = Assembly()
    prompts = make_prompts(3)
    for prompt in prompts:
        assembly.expect(prompt, 2)
    assembly.enter(make_finished("1.0"))
    given_up, names = assembly.give_up([1, 2])
    assert given_up == {1: prompts[1], 2: prompts[2]}
    assert names == ["1.1", "2.0", "2.1"], "what is answered already need not be stopped"
    assert assembly.enter(make_finished("1.1")) is None
    with pytest.raises(RunError, match="answered before"):
        assembly.enter(make_finished("1.1"))
    assert list(assembly.prompts()) == [0]


def test_seeds_depend_on_run_episode_replica_and_purpose_and_on_nothing_else() -> None:
    keys = list(product((0, 1234), range(1, 20), range(4), ("rollout", "evaluation")))
    seeds = [engine_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [engine_seed(*key) for key in keys]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_no_two_processes_and_no_two_episodes_draw_the_same_numbers() -> None:
    """Engines have one seed for what they sample; a process of ours has one for each of its generators."""
    runs, episodes, ranks, roles = (0, 1, 1234), range(30), range(8), get_args(GeneratorRole)
    keys = list(product(runs, episodes, roles, ranks))
    generators = [seed for key in keys for seed in generator_seeds(*key)]
    engines = [
        engine_seed(run, episode, replica, purpose)
        for run, episode, replica, purpose in product(runs, episodes, ranks, get_args(SamplingPurpose))
    ]
    assert len(set(generators + engines)) == len(generators) + len(engines)
    assert generators == [seed for key in keys for seed in generator_seeds(*key)]


def test_every_generator_of_a_process_begins_an_episode_anew() -> None:
    def drawn(episode: int, rank: int) -> tuple[float, float, float]:
        seed_generators(1234, episode, "policy_trainer", rank)
        return float(torch.rand(())), float(np.random.rand()), random.random()

    first = drawn(1, 0)
    for other in (drawn(2, 0), drawn(1, 1)):
        assert all(ours != theirs for ours, theirs in zip(first, other, strict=True))
    assert drawn(1, 0) == first
