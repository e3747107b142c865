"""Legal plans, and what follows from them."""

from __future__ import annotations

import pytest

from chatlearn.errors import ConfigError
from chatlearn.trainer.parallel import ParallelPlan


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


def test_plans_for_later_are_refused_by_the_trainer_only() -> None:
    ParallelPlan(4, 4).require_supported()
    with pytest.raises(ConfigError, match="ulysses_sequence_parallel_size=2"):
        ParallelPlan(4, 4, sequence_parallel_size=2).require_supported()
