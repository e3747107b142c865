"""What every advantage function must keep, ours and a user's."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.algorithm.advantage import ADVANTAGES, AdvantageFn, group_centred, group_normalised, leave_one_out

REWARDS = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=1, max_size=16)
laws = settings(max_examples=80, deadline=None, derandomize=True)
everyone = pytest.mark.parametrize("advantage", [ADVANTAGES[name] for name in sorted(ADVANTAGES)])


@everyone
@laws
@given(rewards=REWARDS)
def test_one_finite_advantage_per_reward(advantage: AdvantageFn, rewards: list[float]) -> None:
    values = advantage(rewards)
    assert len(values) == len(rewards)
    assert all(math.isfinite(value) for value in values)


@everyone
@laws
@given(reward=st.floats(-1e3, 1e3), count=st.integers(1, 33))
def test_equal_rewards_give_exact_zeros(advantage: AdvantageFn, reward: float, count: int) -> None:
    assert advantage([reward] * count) == [0.0] * count


@everyone
@laws
@given(rewards=st.lists(st.integers(0, 4), min_size=1, max_size=16), shift=st.integers(-8, 8))
def test_a_constant_added_to_all_rewards_changes_nothing(
    advantage: AdvantageFn, rewards: list[int], shift: int
) -> None:
    assert advantage([reward + shift for reward in rewards]) == pytest.approx(advantage([float(r) for r in rewards]))


@everyone
@laws
@given(rewards=st.lists(st.integers(0, 4), min_size=2, max_size=16))
def test_a_better_answer_never_gets_less(advantage: AdvantageFn, rewards: list[int]) -> None:
    values = advantage([float(reward) for reward in rewards])
    ordered = sorted(zip(rewards, values, strict=True))
    for (worse, lower), (better, higher) in itertools.pairwise(ordered):
        assert higher > lower if better > worse else higher == pytest.approx(lower)


@laws
@given(rewards=REWARDS)
def test_formulas(rewards: list[float]) -> None:
    mean = statistics.fmean(rewards)
    spread = statistics.pstdev(rewards) + 1e-5
    assert group_centred(rewards) == pytest.approx([r - mean for r in rewards], abs=1e-9)
    assert group_normalised(rewards) == pytest.approx([(r - mean) / spread for r in rewards], abs=1e-6)
    others = [(sum(rewards) - r) / (len(rewards) - 1) if len(rewards) > 1 else r for r in rewards]
    assert leave_one_out(rewards) == pytest.approx([r - o for r, o in zip(rewards, others, strict=True)], abs=1e-9)
