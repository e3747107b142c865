"""Laws between keys. Every function returns all problems it finds, each with what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import lcm
from typing import Final

from chatlearn.config.environment import Environment
from chatlearn.config.placement import DeviceGroup
from chatlearn.config.schedule import schedule_problems
from chatlearn.config.schema import GrpoConfig

CORRECTION: Final = "models.policy_trainer.rollout_correction"


def cross_problems(config: GrpoConfig) -> list[str]:
    """What is wrong with the configuration on any machine."""
    return [
        *_batch_problems(config),
        *_engine_problems(config),
        *_correction_problems(config),
        *_sampling_problems(config),
        *_sharding_problems(config),
        *_optimizer_problems(config),
        *_adapter_problems(config),
        *_evaluation_problems(config),
        *_best_problems(config),
        *_resume_problems(config),
        *_colocation_problems(config),
        *schedule_problems(config),
    ]


def _batch_problems(config: GrpoConfig) -> list[str]:
    runtime = config.runtime_args
    sample = f"runtime_args.sample_per_episode={runtime.sample_per_episode}"
    divisors = {
        "models.policy.num_inference_per_prompt": config.models.policy.num_inference_per_prompt,
        "runtime_args.train_global_batch_size": runtime.train_global_batch_size,
    }
    return [
        f"{key}={value} must divide {sample}; use {choices(runtime.sample_per_episode, value)}"
        for key, value in divisors.items()
        if runtime.sample_per_episode % value != 0
    ]


def _engine_problems(config: GrpoConfig) -> list[str]:
    problems: list[str] = []
    policy, reward = config.models.policy, config.models.reward
    if policy.num_gpu % policy.tensor_model_parallel_size != 0:
        problems.append(
            f"models.policy.tensor_model_parallel_size={policy.tensor_model_parallel_size} must divide "
            f"num_gpu={policy.num_gpu}; use {choices(policy.num_gpu, policy.tensor_model_parallel_size)}"
        )
    if reward.cpu_per_process > reward.num_cpu:
        problems.append(
            f"models.reward.cpu_per_process={reward.cpu_per_process} is more than num_cpu={reward.num_cpu}; "
            f"use at most {reward.num_cpu}"
        )
    return problems


def _correction_problems(config: GrpoConfig) -> list[str]:
    correction, key = config.models.policy_trainer.rollout_correction, CORRECTION
    bounds = {
        "token": (correction.token, correction.token_low, correction.token_high),
        "sequence": (correction.sequence, correction.sequence_low, correction.sequence_high),
    }
    problems = [
        f"{key}.{level}_low and {key}.{level}_high have no effect with {key}.{level}=off; use truncate or mask"
        for level, (mode, low, high) in bounds.items()
        if mode == "off" and (low, high) != (None, None)
    ]
    if correction.sequence == "truncate" and correction.token != "off":
        problems.append(
            f"{key}.token={correction.token} and {key}.sequence=truncate would correct twice: the weight of a sequence "
            "contains the ratios of its tokens; switch one of them off"
        )
    return problems


def _sampling_problems(config: GrpoConfig) -> list[str]:
    policy, correction = config.models.policy, config.models.policy_trainer.rollout_correction
    weighs = correction.token != "off" or correction.sequence == "truncate"
    asked = {
        f"models.policy.top_p={policy.top_p}": policy.top_p < 1,
        f"models.policy.top_k={policy.top_k}": policy.top_k > 0,
        f"models.policy.min_p={policy.min_p}": policy.min_p > 0,
        f"models.policy.presence_penalty={policy.presence_penalty}": policy.presence_penalty != 0,
        f"models.policy.frequency_penalty={policy.frequency_penalty}": policy.frequency_penalty != 0,
        f"models.policy.repetition_penalty={policy.repetition_penalty}": policy.repetition_penalty != 1,
    }
    written = [what for what, is_asked in asked.items() if is_asked]
    if not written or weighs:
        return []
    return [
        f"{', '.join(written)}: the trainer scores the distribution that temperature alone shapes, and would learn "
        f"from answers of another one; leave {'it' if len(written) == 1 else 'them'} out, or set "
        f"{CORRECTION}.token=truncate"
    ]


def _sharding_problems(config: GrpoConfig) -> list[str]:
    trainer, reference = config.models.policy_trainer, config.models.ref_policy
    reference_ranks = reference.num_gpu or trainer.num_gpu
    asked = (
        ("policy_trainer", "fsdp_size", trainer.fsdp_size, trainer.num_gpu),
        ("policy_trainer", "ulysses_sequence_parallel_size", trainer.ulysses_sequence_parallel_size, trainer.num_gpu),
        ("ref_policy", "fsdp_size", reference.fsdp_size, reference_ranks),
        ("ref_policy", "ulysses_sequence_parallel_size", reference.ulysses_sequence_parallel_size, reference_ranks),
    )
    return [
        f"models.{role}.{name}={size} must divide num_gpu={num_ranks}; use {choices(num_ranks, size)}"
        for role, name, size, num_ranks in asked
        if size is not None and num_ranks % size != 0
    ]


def _adapter_problems(config: GrpoConfig) -> list[str]:
    lora, key = config.models.policy_trainer.lora, "models.policy_trainer.lora"
    plain = type(lora)()
    written = {
        f"{key}.alpha={lora.alpha}": lora.alpha != plain.alpha,
        f"{key}.target_modules=[{', '.join(lora.target_modules)}]": lora.target_modules != plain.target_modules,
    }
    return [
        f"{what} has no effect with {key}.rank=0, which trains all weights; set {key}.rank, or leave it out"
        for what, is_written in written.items()
        if is_written and lora.rank == 0
    ]


def _optimizer_problems(config: GrpoConfig) -> list[str]:
    optimizer, key = config.models.policy_trainer.optimizer, "models.policy_trainer.optimizer"
    num_steps = total_iterations(config)
    problems: list[str] = []
    if optimizer.min_lr > 0 and optimizer.schedule == "constant":
        problems.append(
            f"{key}.min_lr={optimizer.min_lr} has no effect with {key}.schedule=constant; choose linear or cosine, "
            "or leave min_lr out"
        )
    elif optimizer.min_lr > optimizer.lr:
        problems.append(f"{key}.min_lr={optimizer.min_lr} must not be above {key}.lr={optimizer.lr}")
    if optimizer.warmup_iterations > num_steps:
        problems.append(
            f"{key}.warmup_iterations={optimizer.warmup_iterations} is more than the {num_steps} optimizer steps of "
            "the run (runtime_args.num_episode times the steps of an episode); the learning rate would never arrive"
        )
    return problems


def total_iterations(config: GrpoConfig) -> int:
    """Optimizer steps of the whole run."""
    runtime = config.runtime_args
    steps_per_episode = runtime.sample_per_episode // runtime.train_global_batch_size * runtime.num_training_epoch
    return runtime.num_episode * steps_per_episode


def _evaluation_problems(config: GrpoConfig) -> list[str]:
    runtime = config.runtime_args
    if runtime.eval_data_path is not None:
        return []
    asked = {
        f"runtime_args.eval_episode_interval={runtime.eval_episode_interval}": runtime.eval_episode_interval > 0,
        "runtime_args.enable_eval_before_training=True": runtime.enable_eval_before_training,
    }
    return [
        f"{what} needs runtime_args.eval_data_path; name a file or switch evaluation off"
        for what, is_asked in asked.items()
        if is_asked
    ]


def _best_problems(config: GrpoConfig) -> list[str]:
    """Whether there will be a checkpoint with an evaluation; which numbers one has is known with its data."""
    runtime = config.runtime_args
    asked = f"runtime_args.keep_best={runtime.keep_best}"
    saving, evaluating = runtime.save_episode_interval, runtime.eval_episode_interval
    if runtime.keep_best is None:
        return []
    if saving == 0:
        return [f"{asked} needs checkpoints; set runtime_args.save_episode_interval"]
    if runtime.eval_data_path is None or evaluating == 0:
        return [f"{asked} needs evaluations; set runtime_args.eval_data_path and runtime_args.eval_episode_interval"]
    if lcm(saving, evaluating) <= runtime.num_episode or runtime.num_episode % evaluating == 0:
        return []
    return [
        f"{asked}: none of the {runtime.num_episode} episodes is both saved and evaluated "
        f"(runtime_args.save_episode_interval={saving}, runtime_args.eval_episode_interval={evaluating}); use "
        f"{choices(saving, evaluating)} for eval_episode_interval"
    ]


def _resume_problems(config: GrpoConfig) -> list[str]:
    runtime = config.runtime_args
    if runtime.load_data_checkpoint_iteration is None or runtime.enable_resume_training:
        return []
    return [
        f"runtime_args.load_data_checkpoint_iteration={runtime.load_data_checkpoint_iteration} asks to go on from a "
        "checkpoint, and runtime_args.enable_resume_training=False not to; leave one of them out"
    ]


def _colocation_problems(config: GrpoConfig) -> list[str]:
    named = Counter(role for group in config.runtime_args.colocation for role in group)
    return [
        f"runtime_args.colocation names {role} {times} times; a role lives in one place"
        for role, times in named.items()
        if times > 1
    ]


def placement_problems(config: GrpoConfig, groups: Sequence[DeviceGroup], environment: Environment) -> list[str]:
    """What does not fit GPUs: roles that cannot share them, engines wider than a node, too few GPUs."""
    if environment.gpus_per_node == 0:
        return [
            f"runtime_args.device={config.runtime_args.device} needs GPUs and this machine shows none; set "
            "runtime_args.device=cpu, or GPUS_PER_NODE to plan for another machine with --dry-run"
        ]
    return [
        *(problem for group in groups for problem in _unreachable(group)),
        *(problem for group in groups for problem in _never_idle(config, group)),
        *_too_wide(config, environment.gpus_per_node),
        *_too_many(groups, environment),
    ]


def _unreachable(group: DeviceGroup) -> list[str]:
    engines, ranks = group.size_of("policy"), group.size_of("policy_trainer")
    if ranks == 0 or engines <= ranks:
        return []
    return [
        f"models.policy.num_gpu={engines} is more than models.policy_trainer.num_gpu={ranks}, with which it shares "
        "GPUs (runtime_args.colocation): an engine takes its weights from a trainer rank on the same GPU; use at most "
        f"{ranks}, or leave policy out of the list, and it has GPUs of its own"
    ]


def _never_idle(config: GrpoConfig, group: DeviceGroup) -> list[str]:
    schedule, others = config.runtime_args.schedule, [role for role in group.roles if role != "policy"]
    if schedule == "sync" or "policy" not in group.roles or not others:
        return []
    return [
        f"runtime_args.schedule={schedule} keeps the engines busy while others compute, so policy cannot share "
        f"the GPUs of {' and '.join(others)} (runtime_args.colocation): leave policy out of the list, or use "
        "schedule=sync"
    ]


def _too_wide(config: GrpoConfig, gpus_per_node: int) -> list[str]:
    width = config.models.policy.tensor_model_parallel_size
    if width <= gpus_per_node:
        return []
    return [
        f"models.policy.tensor_model_parallel_size={width} is more than the GPUs of a node "
        f"(GPUS_PER_NODE={gpus_per_node}), and an engine lies inside one; use {choices(gpus_per_node, gpus_per_node)}"
    ]


def _too_many(groups: Sequence[DeviceGroup], environment: Environment) -> list[str]:
    wanted = sum(group.num_devices for group in groups)
    present = environment.num_nodes * environment.gpus_per_node
    if wanted <= present:
        return []
    roles = "; ".join(f"{' + '.join(group.roles)}: {group.num_devices}" for group in groups)
    return [
        f"the run needs {wanted} GPUs ({roles}), but {environment.num_nodes} node(s) with "
        f"{environment.gpus_per_node} GPUs have {present}; lower models.*.num_gpu, let roles share GPUs with "
        "runtime_args.colocation, or add nodes"
    ]


def torn_engines(config: GrpoConfig, environment: Environment) -> str:
    """What to say where there are GPUs enough, and too few of them beside each other."""
    policy = config.models.policy
    width = policy.tensor_model_parallel_size
    return (
        f"models.policy.num_gpu={policy.num_gpu} with tensor_model_parallel_size={width} makes "
        f"{policy.num_gpu // width} engines, each inside one node, and with the other roles on {environment.num_nodes} "
        f"node(s) with {environment.gpus_per_node} GPUs not all of them find {width} GPUs beside each other; use a "
        f"size that divides the GPUs of a node ({choices(environment.gpus_per_node, width)}), lower num_gpu, or add "
        "nodes"
    )


def choices(number: int, near: int) -> str:
    """The divisors of ``number`` in words; of many, the eight nearest to ``near``.

    >>> choices(8, 3)
    '1, 2, 4 or 8'
    """
    divisors = [candidate for candidate in range(1, number + 1) if number % candidate == 0]
    shown = sorted(sorted(divisors, key=lambda divisor: abs(divisor - near))[:8])
    return " or ".join([", ".join(map(str, shown[:-1])), str(shown[-1])] if len(shown) > 1 else [str(shown[0])])
