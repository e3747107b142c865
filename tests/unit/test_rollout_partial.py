"""Partial rollout: no answer is lost or learned from twice, budgets add up, and late siblings are compared with all."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.algorithm.advantage import ADVANTAGES
from chatlearn.episode import compare
from chatlearn.records import Completion, FinishReason, Graded, Prompt, Rollout, Score, VersionRun
from chatlearn.rollout.partial import PartialPool, Release, Rounds, round_budgets

NUM_COMPLETIONS = 4
EMPTY = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), "", "length", ())


def prompt(number: int) -> Prompt:
    return Prompt(f"0_{number}", np.array([1], np.int32), "?", "source", "1")


def grown(answer: Completion, name: int, reason: FinishReason) -> Completion:
    """One token more; an answer is known by its first token."""
    token_ids = np.append(answer.token_ids, name if len(answer.token_ids) == 0 else 0).astype(np.int32)
    return Completion(token_ids, np.zeros(len(token_ids), np.float32), "", reason, (VersionRun(0, len(token_ids)),))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rounds=st.integers(1, 4),
    above=st.integers(1, NUM_COMPLETIONS - 1),
    episodes=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_every_answer_is_released_exactly_once(rounds: int, above: int, episodes: int, seed: int) -> None:
    """Also where the run ends now and then, and goes on with what a checkpoint kept."""
    chance, names = random.Random(seed), iter(range(1, 10**6))
    pool = PartialPool(Rounds((1,) * rounds, above))
    released: Counter[int] = Counter()
    for episode in range(episodes + rounds):
        if episode < episodes:
            pool.begin(prompt(episode), [EMPTY] * NUM_COMPLETIONS)
        for group in pool.to_ask():
            assert pool.budget(group) == 1
            reasons: list[FinishReason] = chance.choices(["stop", "length"], k=len(group.unfinished))
            completions = tuple(grown(*pair) for pair in zip(group.unfinished, names, reasons, strict=False))
            pool.enter(group, Graded(Rollout(group.prompt, completions), (Score(0.0),) * len(completions)))
        releases = pool.release()
        if chance.random() < 0.4:
            pool = PartialPool(Rounds((1,) * rounds, above), pool.open_groups())
        for release in releases:
            num_known = len(release.earlier) + len(release.graded.scores)
            assert num_known > above or num_known == NUM_COMPLETIONS
            answers = release.graded.rollout.completions
            released.update((release.graded.rollout.prompt.uid, int(answer.token_ids[0])) for answer in answers)
            assert all(len(answer.token_ids) <= rounds for answer in answers)
    assert set(released.values()) == {1}
    assert len(released) == episodes * NUM_COMPLETIONS
    assert pool.open_groups() == []
    assert sum(pool.num_in_round()) == 0


def test_a_late_answer_is_compared_with_all_its_siblings_and_counts_alone() -> None:
    pool = PartialPool(Rounds((1, 1), release_above=1))
    pool.begin(prompt(0), [EMPTY] * 3)
    (group,) = pool.to_ask()
    first = tuple(grown(EMPTY, 10 + index, reason) for index, reason in enumerate(("stop", "stop", "length")))
    pool.enter(group, Graded(Rollout(group.prompt, first), (Score(1.0), Score(0.0), Score(0.0))))
    (early,) = pool.release()
    assert [len(group.unfinished) for group in pool.to_ask()] == [1]
    assert pool.num_in_round() == [0, 1]
    (group,) = pool.to_ask()
    pool.enter(group, Graded(Rollout(group.prompt, (grown(group.unfinished[0], 0, "length"),)), (Score(1.0),)))
    (late,) = pool.release()

    def advantages(release: Release) -> list[float]:
        samples = compare(release.graded, ADVANTAGES["dr_grpo"], release.earlier)
        return [float(sample.advantages[-1]) for sample in samples]

    assert advantages(early) == pytest.approx([0.5, -0.5])
    assert advantages(late) == pytest.approx([1 - 2 / 3])


def test_too_few_finished_answers_wait() -> None:
    pool = PartialPool(Rounds((1, 1), release_above=1))
    pool.begin(prompt(3), [EMPTY] * 3)
    (group,) = pool.to_ask()
    answers = tuple(grown(EMPTY, 10 + index, reason) for index, reason in enumerate(("stop", "length", "length")))
    pool.enter(group, Graded(Rollout(group.prompt, answers), (Score(1.0),) * 3))
    assert pool.release() == []
    (waiting,) = pool.open_groups()
    assert (len(waiting.finished), len(waiting.begun), waiting.round) == (1, 2, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(max_tokens=st.integers(10, 5000), cuts=st.integers(1, 10))
def test_budgets_add_up_to_the_whole_answer(max_tokens: int, cuts: int) -> None:
    """Ten times 0.1 is one: what rounding takes from a round, the last one gets."""
    budgets = round_budgets(max_tokens, [1 / cuts] * cuts)
    assert sum(budgets) == max_tokens
    assert min(budgets) >= 1
