"""From what a user wrote to the frozen records that each trade takes: the only reader of the configuration's fields."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from chatlearn import device
from chatlearn.checkpoint.run_state import RunState
from chatlearn.cluster.crew import (
    Blueprint,
    EngineBlueprint,
    GraderBlueprint,
    ModelBlueprint,
    RolePlan,
    TrainerBlueprint,
)
from chatlearn.cluster.posts import Patience
from chatlearn.cluster.workers import Luggage
from chatlearn.config.environment import wandb_run_id
from chatlearn.config.layout import Layout, ShardedPlan
from chatlearn.config.schema import GrpoConfig
from chatlearn.models.pretrained import cache_bytes_per_token, read_configuration
from chatlearn.observability.sinks import JournalSpec, WandbSpec
from chatlearn.recipe import batch_layout, model_spec, objective, optimizer_spec, parallel_plan
from chatlearn.rollout.engine import EngineSpec, SamplingPlan
from chatlearn.rollout.environment import engine_environment
from chatlearn.rollout.partial import Rounds, round_budgets
from chatlearn.weights.wire import WireKind, choose_wire

MIN_CACHE_BYTES = 2**28
MAX_CACHE_BYTES = (
    2**33
)  # With less than it could use an engine works on fewer answers at once, and needs no more memory.
BLOCK_TOKENS = 128  # vLLM on the CPU hands out its cache in blocks of so many tokens.

# Where a run stays on one machine, its processes talk to each other over the loopback interface and no other.
LOOPBACK_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


def engine_spec(config: GrpoConfig, layout: Layout, cores: tuple[int, ...]) -> EngineSpec:
    """What all engines have in common; ``cores`` are those of the host, ``()`` where hosts differ."""
    policy, runtime = config.models.policy, config.runtime_args
    return EngineSpec(
        model_path=config.models.policy_trainer.load,
        max_model_len=layout.policy.max_sequence_tokens,
        dtype=device.compute_dtype(layout.device_kind),
        device_kind=layout.device_kind,
        tensor_parallel_size=layout.policy.tensor_parallel_size,
        max_num_seqs=policy.generation_batch_size,
        max_num_batched_tokens=policy.max_num_batched_tokens,
        gpu_memory_utilization=policy.gpu_memory_utilization,
        enforce_eager=policy.enforce_eager,
        kv_cache_bytes=_cache_bytes(config, layout),
        seed=runtime.seed,
        wire=_wire(config, layout),
        cpu_cores=cores,
        trust_remote_code=config.models.policy_trainer.trust_remote_code,
        return_routed_experts=config.models.policy_trainer.router_replay is not False,
        sleep_enabled=takes_turns(layout, "policy") and layout.policy.offload_weights,
    )


def _wire(config: GrpoConfig, layout: Layout) -> WireKind:
    """The simple engine knows no wire but shared memory; for the others the layout decides."""
    if config.runtime_args.rollout_backend == "transformers":
        return "shared_memory"
    return choose_wire(layout.device_kind, layout.colocated)


def _cache_bytes(config: GrpoConfig, layout: Layout) -> int:
    """Room for every sequence that runs at once (CPU only: on a GPU ``gpu_memory_utilization`` decides)."""
    trainer = config.models.policy_trainer
    described = read_configuration(
        "models.policy_trainer.load", Path(trainer.load), trust_remote_code=trainer.trust_remote_code
    )
    per_sequence = cache_bytes_per_token(described) * (layout.policy.max_sequence_tokens + BLOCK_TOKENS)
    wanted = per_sequence * config.models.policy.generation_batch_size
    return max(MIN_CACHE_BYTES, per_sequence, min(wanted, MAX_CACHE_BYTES))


def for_replica(spec: EngineSpec, replica: int, num_replicas: int) -> EngineSpec:
    """The spec of one replica: its number, and its share of the cores (more replicas than cores share single ones)."""
    if not spec.cpu_cores:
        return replace(spec, replica=replica)
    width = max(1, len(spec.cpu_cores) // num_replicas)
    first = replica * width % len(spec.cpu_cores)
    return replace(spec, replica=replica, cpu_cores=spec.cpu_cores[first : first + width])


def sampling_plan(config: GrpoConfig) -> SamplingPlan:
    """How training answers are sampled."""
    policy = config.models.policy
    return SamplingPlan(
        temperature=policy.temperature,
        top_p=policy.top_p,
        top_k=max(0, policy.top_k),
        min_p=policy.min_p,
        presence_penalty=policy.presence_penalty,
        frequency_penalty=policy.frequency_penalty,
        repetition_penalty=policy.repetition_penalty,
        max_tokens=policy.max_response_tokens_length,
    )


def evaluation_plan(config: GrpoConfig) -> SamplingPlan:
    """How evaluation answers are sampled."""
    policy = config.models.policy
    return SamplingPlan(
        temperature=policy.eval_temperature,
        top_p=policy.eval_top_p,
        top_k=max(0, policy.eval_top_k),
        min_p=policy.eval_min_p,
        presence_penalty=policy.eval_presence_penalty,
        frequency_penalty=policy.eval_frequency_penalty,
        repetition_penalty=policy.eval_repetition_penalty,
        max_tokens=policy.max_response_tokens_length,
    )


def partial_rounds(config: GrpoConfig) -> Rounds | None:
    """The rounds of partial rollout, where that is asked for."""
    if not config.runtime_args.use_partial_rollout:
        return None
    partial = config.models.partial_rollout_manager
    budgets = round_budgets(config.models.policy.max_response_tokens_length, partial.rollout_ratio)
    return Rounds(budgets, partial.mini_response_per_prompt)


def journal_spec(config: GrpoConfig, layout: Layout, state: RunState) -> JournalSpec:
    """Where the numbers of the run go; what was written after the state one goes on from is forgotten."""
    runtime, log = config.runtime_args, config.runtime_args.log_args_dict
    wandb = WandbSpec(
        project=log.wandb_project,
        directory=layout.folders.wandb,
        name=log.wandb_name or runtime.exp_name,
        run_id=log.wandb_id or wandb_run_id(),
        resume=log.wandb_resume,
    )
    return JournalSpec(
        directory=layout.folders.output,
        num_episodes=runtime.num_episode,
        resume_after=state.episode if state.episode > 0 else None,
        save_rollouts=runtime.save_rollouts,
        tensorboard_dir=layout.folders.tensorboard if log.enable_tensorboard else None,
        wandb=wandb if log.enable_wandb else None,
        settings=config.model_dump(),
    )


def blueprint(config: GrpoConfig, layout: Layout, *, one_host: bool) -> Blueprint:
    """Every process of the run; ``one_host`` says that Ray is ours and everything stays on this machine."""
    return Blueprint(
        policy=_engines(config, layout, one_host=one_host),
        trainer=TrainerBlueprint(
            sharded=_sharded(config, layout, layout.trainer, "policy_trainer", one_host=one_host),
            optimizer=optimizer_spec(config),
            objective=objective(config),
            steps=batch_layout(layout.training, Path(layout.trainer.load)),
        ),
        reference=None
        if layout.reference is None
        else _sharded(config, layout, layout.reference, "ref_policy", one_host=one_host),
        base_is_reference=layout.base_is_reference,
        graders=_graders(config, layout),
        exporter=_exporter(config),
        saves_in_background=config.runtime_args.save_in_background,
        takes_turns=takes_turns(layout, "policy"),
        device_kind=layout.device_kind,
        patience=Patience(config.runtime_args.engine_timeout_s, config.runtime_args.engine_restart_timeout_s),
    )


def _engines(config: GrpoConfig, layout: Layout, *, one_host: bool) -> EngineBlueprint:
    engines = layout.policy
    cores = layout.share_cores(sorted(os.sched_getaffinity(0))).engines if one_host else ()
    common = engine_spec(config, layout, cores)
    replicas = tuple(for_replica(common, replica, engines.num_replicas) for replica in range(engines.num_replicas))
    environments = tuple(
        device.worker_environment(layout.device_kind, engines.cores_per_process * engines.tensor_parallel_size)
        | engine_environment(spec)
        | (LOOPBACK_ENVIRONMENT if one_host else {})
        for spec in replicas
    )
    plan = RolePlan(layout.arrangement.processes["policy"], 0, engines.cores_per_process, (), environments)
    return EngineBlueprint(
        plan, config.runtime_args.rollout_backend, replicas, common.wire, gives_way=common.sleep_enabled
    )


def _sharded(config: GrpoConfig, layout: Layout, sharded: ShardedPlan, role: str, *, one_host: bool) -> ModelBlueprint:
    environment = device.worker_environment(
        layout.device_kind, sharded.cores_per_process, expandable_segments=sharded.use_expandable_segments
    ) | (LOOPBACK_ENVIRONMENT if one_host else {})
    # Engines are bound to the other cores then, and threads that may go anywhere would wander onto them.
    bound = one_host and layout.overlaps and layout.device_kind == "cpu"
    cores = layout.share_cores(sorted(os.sched_getaffinity(0))).learners if bound else ()
    environments = (environment,) * sharded.num_ranks
    moves = takes_turns(layout, role)
    return ModelBlueprint(
        plan=RolePlan(layout.arrangement.processes[role], 0, sharded.cores_per_process, cores, environments),
        model=model_spec(config, layout, sharded),
        parallel=parallel_plan(sharded),
        scores=batch_layout(sharded.scoring, Path(sharded.load)),
        luggage=Luggage(moves and sharded.offload_weights, moves and sharded.offload_optimizer_states),
    )


def takes_turns(layout: Layout, role: str) -> bool:
    """Whether a role shares accelerators with others; on the CPU every process keeps its own memory."""
    return layout.device_kind == "cuda" and any(role in group.roles and len(group.roles) > 1 for group in layout.groups)


def _exporter(config: GrpoConfig) -> RolePlan | None:
    """It reserves no core: it works now and then, and yields to those who train."""
    if not config.models.policy_trainer.save_hf or config.runtime_args.save_episode_interval == 0:
        return None
    return RolePlan((), 0, 1, (), (device.worker_environment("cpu", 1),))


def _graders(config: GrpoConfig, layout: Layout) -> GraderBlueprint:
    reward = config.models.reward
    environment = device.worker_environment("cpu", 1)
    plan = RolePlan((), reward.cpu_per_process, 1, (), (environment,) * layout.num_graders)
    return GraderBlueprint(plan, reward.function, reward.deadline_s, reward.cpu_per_process)
