"""Started by ``test_vllm_contract.py``, with a specification as JSON: does vLLM use the experts that it is sent?"""

from __future__ import annotations

import json
import sys
from typing import Any

from routed_answers import check_routes

from chatlearn.errors import WeightTransferError
from chatlearn.rollout.engine import EngineSpec, build_engine
from chatlearn.rollout.prove import OneEngine, prove_weight_transfer
from chatlearn.weights.checkpoint_source import CheckpointSource
from chatlearn.weights.shared_memory import SharedMemorySender


def switch_the_cure_off(worker: Any) -> None:
    """Leave vLLM alone with its fault, in a worker process."""
    from chatlearn.rollout import vllm_worker

    worker.cure = vllm_worker.forget_moe_kernels
    vllm_worker.forget_moe_kernels = lambda model: None


def switch_the_cure_on(worker: Any) -> None:
    from chatlearn.rollout import vllm_worker

    vllm_worker.forget_moe_kernels = worker.cure


def main() -> None:
    options = json.loads(sys.argv[1])
    spec = EngineSpec(**{**options, "cpu_cores": tuple(options["cpu_cores"])})
    engine: Any = build_engine("vllm", spec)
    prove_weight_transfer(engine, spec.model_path, tolerance=2e-5)
    check_routes(engine, spec)
    sys.stdout.write("proved\n")
    sender = SharedMemorySender(CheckpointSource(spec.model_path), OneEngine(engine), rank=0)
    engine._engine.collective_rpc(switch_the_cure_off)
    try:
        sender.send(1)
    except WeightTransferError as error:
        sys.stdout.write(f"caught: {error}\n")
    engine._engine.collective_rpc(switch_the_cure_on)
    sender.send(2)
    check_routes(engine, spec)
    engine.close()
    sys.stdout.write("healed\n")


if __name__ == "__main__":
    main()
