"""Legal plans, and what follows from them."""

from __future__ import annotations

import pytest

from chatlearn.errors import ConfigError
from chatlearn.trainer.parallel import ParallelPlan, sequence_parallel_problem


def test_data_is_dealt_to_groups_of_neighbours() -> None:
    plan = ParallelPlan(num_ranks=8, fsdp_size=4, sequence_parallel_size=2)
    assert plan.data_size == 4
    assert plan.num_replicas == 2
    assert [plan.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_all_faults_of_a_plan_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelPlan(num_ranks=8, fsdp_size=3, sequence_parallel_size=0)
    assert caught.value.problems == (
        "fsdp_size=3 must be at least 1 and divide the number of ranks num_gpu=8; use 1 or 2 or 4 or 8",
        "ulysses_sequence_parallel_size=0 must be at least 1 and divide the number of ranks num_gpu=8; "
        "use 1 or 2 or 4 or 8",
    )


@pytest.mark.parametrize(("size", "num_ranks", "num_heads"), [(1, 1, 7), (2, 4, 14), (4, 4, 4), (8, 16, 40)])
def test_sequences_may_be_shared_by_ranks_that_divide_the_heads(size: int, num_ranks: int, num_heads: int) -> None:
    assert sequence_parallel_problem(size, num_ranks, num_heads) is None


@pytest.mark.parametrize("size", [0, 3, 4, 8])
def test_other_sizes_are_refused_with_those_that_would_do(size: int) -> None:
    """Four divides the ranks alone, three neither of the two."""
    assert sequence_parallel_problem(size, num_ranks=8, num_attention_heads=14) == (
        f"ulysses_sequence_parallel_size={size} must be at least 1 and divide both the number of ranks num_gpu=8 and "
        "the model's 14 attention heads; use 1 or 2"
    )
