"""Laws of planning: everyone once, never above the cap, equal numbers, balanced work, fast."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.batch.plan import BatchLayout, best_fit_decreasing, bin_cost, cost, oversized, plan

LENGTHS = st.lists(st.integers(1, 120), min_size=1, max_size=60)
laws = settings(max_examples=150, deadline=None, derandomize=True)


def packed(num_ranks: int, max_tokens: int) -> BatchLayout:
    return BatchLayout(num_data_ranks=num_ranks, packing=True, max_tokens=max_tokens, micro_batch_size=1)


def counted(num_ranks: int, micro_batch_size: int) -> BatchLayout:
    return BatchLayout(num_data_ranks=num_ranks, packing=False, max_tokens=1, micro_batch_size=micro_batch_size)


LAYOUTS = st.one_of(
    st.builds(packed, st.integers(1, 5), st.integers(1, 150)), st.builds(counted, st.integers(1, 5), st.integers(1, 7))
)


@laws
@given(LENGTHS, LAYOUTS)
def test_every_sample_has_exactly_one_place(lengths: list[int], layout: BatchLayout) -> None:
    ranks = plan(lengths, layout)
    assert len(ranks) == layout.num_data_ranks
    assert sorted(index for bins in ranks for members in bins for index in members) == list(range(len(lengths)))


@laws
@given(LENGTHS, LAYOUTS)
def test_all_ranks_have_equally_many_micro_batches(lengths: list[int], layout: BatchLayout) -> None:
    assert len({len(bins) for bins in plan(lengths, layout)}) == 1


@laws
@given(LENGTHS, st.integers(1, 5), st.integers(1, 150))
def test_no_bin_exceeds_the_cap_unless_one_sample_does(lengths: list[int], num_ranks: int, max_tokens: int) -> None:
    layout = packed(num_ranks, max_tokens)
    alone = set(oversized(lengths, layout))
    assert alone == {index for index, length in enumerate(lengths) if length > max_tokens}
    for members in (members for bins in plan(lengths, layout) for members in bins):
        if alone.isdisjoint(members):
            assert sum(lengths[index] for index in members) <= max_tokens
        else:
            assert len(members) == 1


@laws
@given(LENGTHS, st.integers(1, 5), st.integers(1, 7))
def test_without_packing_a_bin_counts_samples(lengths: list[int], num_ranks: int, micro_batch_size: int) -> None:
    layout = counted(num_ranks, micro_batch_size)
    ranks = plan(lengths, layout)
    per_rank = [sum(len(members) for members in bins) for bins in ranks]
    assert max(per_rank) <= -(-len(lengths) // num_ranks)
    assert all(len(members) <= micro_batch_size for bins in ranks for members in bins)
    assert oversized(lengths, layout) == ()


@laws
@given(LENGTHS, LAYOUTS)
def test_a_bin_is_empty_only_where_a_rank_has_too_few_samples(lengths: list[int], layout: BatchLayout) -> None:
    for bins in plan(lengths, layout):
        num_samples = sum(len(members) for members in bins)
        assert sum(bool(members) for members in bins) == min(num_samples, len(bins))


@laws
@given(LENGTHS, LAYOUTS)
def test_the_plan_is_a_function_of_the_lengths(lengths: list[int], layout: BatchLayout) -> None:
    assert plan(lengths, layout) == plan(tuple(lengths), layout)


@laws
@given(LENGTHS, LAYOUTS)
def test_costliest_bins_meet_first(lengths: list[int], layout: BatchLayout) -> None:
    for bins in plan(lengths, layout):
        costs = [bin_cost(members, [cost(length) for length in lengths]) for members in bins]
        assert costs == sorted(costs, reverse=True)


def test_an_exact_fit_fits() -> None:
    assert plan([5, 5, 5, 5], packed(1, 10)) == (((0, 2), (1, 3)),)
    assert best_fit_decreasing([0, 1, 2, 3], [5, 5, 5, 5], capacity=10) == [[0, 1], [2, 3]]


def test_the_original_second_pass_that_broke_the_cap_stays_below_it() -> None:
    """64 samples of 50 to 3,072 tokens and a cap of 8,192: the original exceeded it in 52 of 300 trials."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        lengths = generator.integers(50, 3073, size=64).tolist()
        (bins,) = plan(lengths, packed(1, 8192))
        assert max(sum(lengths[index] for index in members) for members in bins) <= 8192
        assert len(bins) == len(best_fit_decreasing(sorted(range(64), key=lambda i: -lengths[i]), lengths, 8192))


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_work_is_balanced_over_ranks_and_steps(num_ranks: int) -> None:
    """Ranks wait for each other at every micro-batch, so the time of a step is the sum of its slowest bins."""
    lengths = np.random.default_rng(1).lognormal(6.5, 0.9, size=64 * num_ranks).clip(20, 8192).astype(int).tolist()
    ranks = plan(lengths, packed(num_ranks, 16_384))
    costs = np.array(
        [[bin_cost(members, [cost(length) for length in lengths]) for members in bins] for bins in ranks], dtype=float
    )
    assert costs.sum(axis=1).max() / costs.sum(axis=1).mean() < 1.02
    assert costs.max(axis=0).sum() / costs.sum(axis=1).mean() < 1.10


def test_a_long_sequence_costs_more_than_its_parts() -> None:
    assert cost(20_000) > 2 * cost(10_000)


def test_planning_100_000_samples_takes_seconds_at_most() -> None:
    lengths = np.random.default_rng(2).lognormal(6.5, 0.9, size=100_000).clip(20, 16_384).astype(int).tolist()
    start = time.process_time()
    plan(lengths, packed(8, 16_384))
    # Measured: 0.4 to 0.7 s. A quadratic plan would take minutes; the wide bound keeps a busy machine from failing it.
    assert time.process_time() - start < 5
