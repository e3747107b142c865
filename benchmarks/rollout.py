"""How fast an engine starts, samples and takes new weights: python benchmarks/rollout.py --cores 0 --requests 256.

The process starts itself once more with the environment that an engine needs. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chatlearn.rollout.engine import EngineSpec, Request, RolloutEngine, SamplingPlan, build_engine
from chatlearn.rollout.environment import engine_environment
from chatlearn.rollout.prove import OneEngine, prove_weight_transfer
from chatlearn.weights.checkpoint_source import CheckpointSource, expected_tensors
from chatlearn.weights.shared_memory import SharedMemorySender

EMBEDDED = Path(__file__).parents[1] / "embedded" / "tiny_qwen3"
IN_CHILD = "CHATLEARN_BENCHMARK_CHILD"
NUM_TRANSFERS = 10


@dataclass(frozen=True)
class Speed:
    """Tokens that were generated in one batch, and how many of them a second."""

    num_tokens: int
    tokens_per_s: float


def sample(engine: RolloutEngine, vocabulary: int, num_requests: int, max_tokens: int) -> Speed:
    """Answer nonsense prompts of 32 tokens; few of them end by themselves."""
    prompts = np.random.default_rng(0).integers(vocabulary, size=(num_requests, 32), dtype=np.int32)
    started = time.perf_counter()
    engine.submit(
        [Request(str(index), prompt) for index, prompt in enumerate(prompts)],
        SamplingPlan(max_tokens=max_tokens, seed=0),
    )
    num_tokens = sum(len(finished.completion.token_ids) for finished in engine.completions())
    return Speed(num_tokens, num_tokens / (time.perf_counter() - started))


def measure(spec: EngineSpec, engine_name: str, num_requests: int, max_tokens: int) -> dict[str, float]:
    """Everything worth knowing about one engine."""
    started = time.perf_counter()
    engine = build_engine(engine_name, spec)
    start_s = time.perf_counter() - started
    vocabulary = expected_tensors(spec.model_path)["model.embed_tokens.weight"][0]
    started = time.perf_counter()
    sample(engine, vocabulary, 1, 2)
    first_s = time.perf_counter() - started
    started = time.perf_counter()
    prove_weight_transfer(engine, spec.model_path, tolerance=1e-4)
    proof_s = time.perf_counter() - started
    sender = SharedMemorySender(CheckpointSource(spec.model_path), OneEngine(engine), rank=0)
    transfers = [sender.send(version).seconds for version in range(NUM_TRANSFERS)]
    speeds = [sample(engine, vocabulary, num_requests, max_tokens) for _ in range(3)]
    engine.close()
    return {
        "start_s": start_s,
        "first_generation_s": first_s,
        "proof_s": proof_s,
        "transfer_s": float(np.median(transfers)),
        "num_tokens": speeds[0].num_tokens,
        "tokens_per_s": float(np.median([speed.tokens_per_s for speed in speeds])),
    }


def main() -> None:
    """Measure in a process that was started as an engine's must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--model", default=str(EMBEDDED))
    parser.add_argument("--cores", default="0", help="comma separated")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    cores = tuple(int(core) for core in options.cores.split(","))
    spec = EngineSpec(options.model, max_model_len=512, cpu_cores=cores, tensor_parallel_size=options.tensor_parallel)
    if IN_CHILD not in os.environ:
        environment = os.environ | engine_environment(spec) | {IN_CHILD: "1"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    print(json.dumps(measure(spec, options.engine, options.requests, options.tokens)))


if __name__ == "__main__":
    main()
