"""vLLM where the common contract does not reach: tensor parallel, with experts, and what it would be told on a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from chatlearn.rollout.engine import EngineSpec, WakePart
from chatlearn.rollout.environment import engine_environment
from chatlearn.rollout.vllm_engine import start_vllm
from chatlearn.weights.wire import WireKind

# vLLM's own imports warn of torch's and Python's deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EMBEDDED = Path(__file__).parents[2] / "embedded"
SPEC = EngineSpec(str(EMBEDDED / "tiny_qwen3"), max_model_len=96)


def test_vllms_gpu_worker_takes_what_it_is_told_when_it_sleeps_and_wakes() -> None:
    from vllm.v1.executor.abstract import SLEEP_TAGS
    from vllm.v1.worker.gpu_worker import Worker

    assert set(get_args(WakePart)) == set(SLEEP_TAGS), "two steps, and nothing is left asleep"
    signature(Worker.sleep).bind(None, level=2)
    signature(Worker.wake_up).bind(None, tags=["weights"])


@pytest.mark.parametrize(("wire", "sleeps"), [("ipc", True), ("nccl", False)])
def test_on_a_gpu_vllm_is_started_able_to_sleep_where_it_shares_and_with_the_right_wire(
    monkeypatch: pytest.MonkeyPatch, wire: WireKind, sleeps: bool
) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    started: list[EngineArgs] = []

    def start(arguments: EngineArgs, *, enable_multiprocessing: bool) -> None:
        assert not enable_multiprocessing
        started.append(arguments)

    monkeypatch.setattr(LLMEngine, "from_engine_args", start)
    start_vllm(replace(SPEC, device_kind="cuda", wire=wire, sleep_enabled=sleeps, gpu_memory_utilization=0.7))
    arguments = started[0]
    assert (arguments.enable_sleep_mode, arguments.gpu_memory_utilization) == (sleeps, 0.7)
    assert cast("Any", arguments.weight_transfer_config).backend == f"chatlearn_{wire}"


def test_experts_on_two_tensor_parallel_ranks_use_what_they_are_sent_and_a_fault_is_named() -> None:
    spec = EngineSpec(
        str(EMBEDDED / "tiny_qwen3_moe"),
        max_model_len=64,
        tensor_parallel_size=2,
        kv_cache_bytes=2**26,
        cpu_cores=tuple(sorted(os.sched_getaffinity(0)))[:2],
        return_routed_experts=True,
    )
    program = [sys.executable, str(Path(__file__).with_name("prove_experts.py")), json.dumps(asdict(spec))]
    environment = os.environ | engine_environment(spec) | {"PYTHONPATH": str(EMBEDDED.parent)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [line for line in done.stdout.splitlines() if line.startswith(("proved", "caught", "healed"))]
    assert len(said) == 3, done.stdout[-2000:]
    fault = r"caught: model\.layers\.0\.mlp\.experts\S*: still has the kernel from before the update"
    assert re.match(fault, said[1]), said[1]
