"""Whether the host's memory will do: from a configuration to the numbers of the budget, and its verdict."""

from __future__ import annotations

from pathlib import Path

from chatlearn import device
from chatlearn.budget import (
    BYTES_PER_GB,
    BudgetLine,
    EngineLoad,
    EpisodeLoad,
    HostLoad,
    ShardedLoad,
    budget_problem,
    host_budget,
    needed_bytes,
    num_parameters,
)
from chatlearn.config.environment import visible_gpus
from chatlearn.config.layout import Layout, ShardedPlan
from chatlearn.config.schema import GrpoConfig
from chatlearn.errors import ConfigError
from chatlearn.models.pretrained import read_configuration
from chatlearn.specs import engine_spec, takes_turns
from chatlearn.trainer.build import ModelSpec
from chatlearn.weights.shared_memory import BUCKET_BYTES

# A part that is less of the whole only hides the others.
SMALLEST_PART_SHOWN = 0.01


def check_host_memory(config: GrpoConfig, layout: Layout) -> None:
    """Raise ``ConfigError`` where the run cannot fit; a plan for another machine's GPUs is not measured on this one."""
    if layout.device_kind == "cuda" and visible_gpus() == 0:
        return
    problem = budget_problem(host_budget(host_load(config, layout)), device.available_host_bytes())
    if problem is not None:
        raise ConfigError(problem)


def host_memory_rows(config: GrpoConfig, layout: Layout) -> list[tuple[str, str]]:
    """The budget in words: what is needed at most, and every part that shows in it."""
    lines = host_budget(host_load(config, layout))
    needed = needed_bytes(lines)
    shown = [line for line in lines if line.num_bytes >= SMALLEST_PART_SHOWN * needed]
    return [("host memory", f"{_gigabytes(needed)} on one node"), *(_row(line) for line in shown)]


def _row(line: BudgetLine) -> tuple[str, str]:
    when = {"start": ", while models load", "episode": "", "always": ""}[line.when]
    return f"  {line.what}", f"{_gigabytes(line.num_bytes)}{when}: {line.formula}"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / BYTES_PER_GB:.2f} GB"


def host_load(config: GrpoConfig, layout: Layout) -> HostLoad:
    """What one node of the run holds; on several nodes, the fullest one, where the driver is."""
    engine = engine_spec(config, layout, ())
    on_cpu = layout.device_kind == "cpu"
    count = num_parameters(Path(layout.trainer.load))
    engines = layout.policy.num_replicas
    if not on_cpu:
        engines = min(engines, max(1, layout.gpus_per_node // layout.policy.tensor_parallel_size))
    plans = {"policy_trainer": layout.trainer, "ref_policy": layout.reference}
    sharded = tuple(_sharded_load(config, layout, role, plan) for role, plan in plans.items() if plan is not None)
    engine_bytes = 4 if engine.dtype == "float32" else 2
    # The simple engine keeps no cache between answers.
    has_cache = on_cpu and config.runtime_args.rollout_backend != "transformers"
    cache_bytes = engine.kv_cache_bytes if has_cache else 0
    widths = engines * layout.policy.tensor_parallel_size
    return HostLoad(
        sharded=sharded,
        engine=EngineLoad(count, engines, engine_bytes, on_cpu, cache_bytes),
        episode=_episode_load(config, layout),
        transfer_bytes=min(count * engine_bytes, 2 * BUCKET_BYTES) if engine.wire == "shared_memory" else 0,
        num_processes=1
        + _exports(config)
        + widths
        + sum(load.num_ranks for load in sharded)
        + layout.num_graders // layout.num_nodes,
    )


def _sharded_load(config: GrpoConfig, layout: Layout, role: str, plan: ShardedPlan) -> ShardedLoad:
    on_cpu = layout.device_kind == "cpu"
    moves = takes_turns(layout, role)
    trains_all = role == "policy_trainer" and not plan.takes_adapter
    count = num_parameters(Path(plan.load))
    weight_bytes = 4 if on_cpu or trains_all else 2
    return ShardedLoad(
        role=role,
        num_parameters=count,
        num_trained=count if trains_all else 0,  # an adapter's are too few to count
        num_ranks=plan.num_ranks if on_cpu else min(plan.num_ranks, layout.gpus_per_node),
        fsdp_size=plan.fsdp_size,
        weight_bytes=weight_bytes,
        moment_bytes=4 if config.models.policy_trainer.optimizer.state_dtype == "float32" else 2,
        meta_init=plan.meta_init,
        weights_on_host=on_cpu or plan.keeps_on_host or (moves and plan.offload_weights),
        gradients_on_host=on_cpu or plan.keeps_on_host,
        moments_on_host=on_cpu or plan.keeps_on_host or (moves and plan.offload_optimizer_states),
        stays_gathered=on_cpu and count * weight_bytes < ModelSpec.whole_below_bytes,
        copied_for_saving=trains_all and _saves_in_background(config),
    )


def _exports(config: GrpoConfig) -> bool:
    """Whether a process of its own makes Hugging Face directories."""
    return config.models.policy_trainer.save_hf and config.runtime_args.save_episode_interval > 0


def _saves_in_background(config: GrpoConfig) -> bool:
    return config.runtime_args.save_in_background and config.runtime_args.save_episode_interval > 0


def _episode_load(config: GrpoConfig, layout: Layout) -> EpisodeLoad:
    policy, trainer = config.models.policy, config.models.policy_trainer
    expert_bytes = 0
    if trainer.router_replay is not False:
        described = read_configuration(
            "models.policy_trainer.load", Path(trainer.load), trust_remote_code=trainer.trust_remote_code
        )
        width = 1 if described.num_experts <= 256 else 2
        expert_bytes = described.num_hidden_layers * described.num_experts_per_tok * width
    return EpisodeLoad(
        num_samples=layout.samples_per_episode,
        prompt_tokens=policy.max_prompt_tokens_length,
        response_tokens=policy.max_response_tokens_length,
        num_steps=layout.num_minibatches,
        has_old_logprobs=layout.steps_per_episode > 1,
        has_reference=trainer.kl_coef > 0,
        expert_bytes=expert_bytes,
    )
