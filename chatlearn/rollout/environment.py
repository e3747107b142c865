"""The environment variables an engine's process must be started with; a pure function, set by whoever starts it."""

from __future__ import annotations

from chatlearn.rollout.engine import EngineSpec


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Variables for the process that will build an engine from ``spec``, to be set before it starts.

    One engine lives in one process with its scheduler inside, so that stepping, aborting and reseeding are plain calls;
    tensor-parallel workers are spawned by that process, never placed by Ray. Nothing is reported to anybody.

    >>> engine_environment(EngineSpec("m", 64, cpu_cores=(2, 3), tensor_parallel_size=2))["VLLM_CPU_OMP_THREADS_BIND"]
    '2|3'
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return environment | (cpu_environment(spec) if spec.device_kind == "cpu" else {})


def cpu_environment(spec: EngineSpec) -> dict[str, str]:
    """Threads: each tensor-parallel rank gets its share of the cores, and idle threads give their core away."""
    shares = core_shares(spec.cpu_cores, spec.tensor_parallel_size)
    environment = {
        # Threads that spin while the engine waits would take the core from the trainer, whose turn it is then.
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, share)) for share in shares) or "nobind",
    }
    if shares:
        environment["OMP_NUM_THREADS"] = str(len(shares[0]))
    return environment


def core_shares(cores: tuple[int, ...], num_ranks: int) -> list[tuple[int, ...]]:
    """Equal shares of neighbouring cores; where there are too few, ranks share single ones; no cores, no shares."""
    if not cores:
        return []
    size = max(1, len(cores) // num_ranks)
    starts = [rank * size % len(cores) for rank in range(num_ranks)]
    return [cores[start : start + size] for start in starts]
