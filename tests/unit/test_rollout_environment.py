"""An engine's process gets its share of the cores, and never asks Ray or the internet for anything."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.rollout.engine import EngineSpec
from chatlearn.rollout.environment import core_shares, engine_environment


@settings(max_examples=40, deadline=None, derandomize=True)
@given(num_cores=st.integers(0, 16), num_ranks=st.integers(1, 8))
def test_every_rank_gets_an_equal_share_of_the_given_cores(num_cores: int, num_ranks: int) -> None:
    cores = tuple(range(3, 3 + num_cores))
    shares = core_shares(cores, num_ranks)
    assert len(shares) == (num_ranks if cores else 0)
    assert len({len(share) for share in shares}) <= 1
    assert all(share and set(share) <= set(cores) for share in shares)
    if num_cores >= num_ranks:
        taken = [core for share in shares for core in share]
        assert len(taken) == len(set(taken))


def test_threads_are_bound_on_the_cpu_and_left_alone_on_a_gpu() -> None:
    on_cpu = engine_environment(EngineSpec("m", 64, cpu_cores=(0, 1, 2, 3), tensor_parallel_size=2))
    assert on_cpu["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert on_cpu["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in engine_environment(EngineSpec("m", 64, device_kind="cuda"))
    assert engine_environment(EngineSpec("m", 64))["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_nothing_is_reported_to_anybody() -> None:
    environment = engine_environment(EngineSpec("m", 64))
    assert environment["VLLM_NO_USAGE_STATS"] == environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
