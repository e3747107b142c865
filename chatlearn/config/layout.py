"""What follows from a configuration on a given machine: computed once, frozen, and never asked of the config."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Final, Literal, TypeVar

from chatlearn.config.checks import placement_problems, torn_engines
from chatlearn.config.cores import CoreSplit, side_by_side, taking_turns
from chatlearn.config.environment import Environment
from chatlearn.config.placement import (
    Arrangement,
    DeviceGroup,
    arrange,
    arrange_anywhere,
    base_is_reference,
    device_groups,
)
from chatlearn.config.schedule import works_at_once
from chatlearn.config.schema import GrpoConfig
from chatlearn.errors import ConfigError

Item = TypeVar("Item")
DeviceKind = Literal["cpu", "cuda"]

# Where the trainer's checkpoints lie below the output directory.
TRAINER_CHECKPOINTS: Final = Path("save_model", "policy_trainer")


@dataclass(frozen=True)
class PackingRule:
    """How samples become micro-batches of one model; the fields of ``batch.pack.BatchLayout``."""

    num_data_ranks: int
    packing: bool
    max_tokens: int
    micro_batch_size: int


@dataclass(frozen=True)
class ShardedPlan:
    """A model that is sharded over ranks: the trainer's or the reference model.

    The ``offload_*`` fields tell what goes to host memory while others use the same GPUs, ``keeps_on_host`` that all
    of it stays there also during a step. ``takes_adapter`` is True for the model that LoRA trains.
    """

    load: str
    num_ranks: int
    fsdp_size: int
    sequence_parallel_size: int
    meta_init: bool
    groupgemm: bool
    use_expandable_segments: bool
    offload_weights: bool
    offload_optimizer_states: bool
    keeps_on_host: bool
    takes_adapter: bool
    cores_per_process: int
    scoring: PackingRule


@dataclass(frozen=True)
class EnginePlan:
    """The engines: how many, how wide, and how long a sequence can become (prompt and answer, in tokens).

    ``offload_weights`` tells that an engine gives its GPU memory back while others use the same GPUs.
    """

    num_replicas: int
    tensor_parallel_size: int
    offload_weights: bool
    cores_per_process: int
    max_sequence_tokens: int


@dataclass(frozen=True)
class Folders:
    """Where a run writes."""

    output: Path
    save_model: Path
    data_checkpoint: Path
    tensorboard: Path
    wandb: Path


@dataclass(frozen=True)
class Layout:
    """The numbers of a run. ``reference`` is None when ``kl_coef`` is 0: what is not asked for is not loaded.

    It is None too where ``base_is_reference``: a LoRA trainer with its adapter off is the model it started from.

    ``colocated`` tells that engines and trainer share their devices and take turns. ``groups`` are the sets of GPUs and
    who lives on them, ``arrangement`` is who gets which; on the CPU every role has its own processes and the two only
    say who takes turns and which node a process is on. ``overlaps``: engines generate while others compute.
    """

    device_kind: DeviceKind
    num_nodes: int
    gpus_per_node: int
    prompts_per_episode: int
    samples_per_episode: int
    num_minibatches: int
    num_training_epoch: int
    policy: EnginePlan
    trainer: ShardedPlan
    training: PackingRule
    reference: ShardedPlan | None
    base_is_reference: bool
    num_graders: int
    colocated: bool
    groups: tuple[DeviceGroup, ...]
    arrangement: Arrangement
    overlaps: bool
    folders: Folders

    @property
    def steps_per_episode(self) -> int:
        """Optimizer steps per episode; with more than one, the old log-probabilities must be computed before."""
        return self.num_minibatches * self.num_training_epoch

    @property
    def num_devices(self) -> int:
        """GPUs (on the CPU: ranks) over all groups."""
        return sum(group.num_devices for group in self.groups)

    def share_cores(self, cores: Sequence[int]) -> CoreSplit:
        """Who computes on which of a node's cores (CPU only: on GPU machines threads are few and not bound)."""
        return (side_by_side if self.overlaps else taking_turns)(cores)

    def batches(self, samples: Sequence[Item], seed: int) -> Iterator[list[Item]]:
        """Cut an episode's samples into one part per optimizer step; from the second pass on they are shuffled.

        Parts differ by at most one sample, so that samples that were left out do not cost a step.
        """
        order = list(range(len(samples)))
        shuffle = random.Random(seed)
        for epoch in range(self.num_training_epoch):
            if epoch > 0:
                shuffle.shuffle(order)
            for part in range(self.num_minibatches):
                first = part * len(order) // self.num_minibatches
                after = (part + 1) * len(order) // self.num_minibatches
                yield [samples[index] for index in order[first:after]]


def device_kind_of(config: GrpoConfig, environment: Environment) -> DeviceKind:
    """Settle ``device=auto`` without loading a GPU library: CUDA where the launcher or the machine tells of a GPU."""
    if config.runtime_args.device != "auto":
        return config.runtime_args.device
    return "cuda" if environment.gpus_per_node > 0 else "cpu"


def layout_of(config: GrpoConfig, environment: Environment) -> Layout:
    """Derive the numbers of a run; raises one ``ConfigError`` with everything that does not fit the machine."""
    kind = device_kind_of(config, environment)
    groups = device_groups(config)
    arrangement = _arrangement(config, groups, kind, environment)
    overlaps = works_at_once(config)
    cores = _cores(kind, arrangement, overlaps, environment)
    runtime, policy, trainer = config.runtime_args, config.models.policy, config.models.policy_trainer
    reward = config.models.reward
    micro_batch = runtime.train_micro_batch_size
    data_ranks = trainer.num_gpu // trainer.ulysses_sequence_parallel_size
    return Layout(
        device_kind=kind,
        num_nodes=environment.num_nodes,
        gpus_per_node=environment.gpus_per_node if kind == "cuda" else 0,
        prompts_per_episode=runtime.sample_per_episode // policy.num_inference_per_prompt,
        samples_per_episode=runtime.sample_per_episode,
        num_minibatches=runtime.sample_per_episode // runtime.train_global_batch_size,
        num_training_epoch=runtime.num_training_epoch,
        policy=EnginePlan(
            num_replicas=policy.num_gpu // policy.tensor_model_parallel_size,
            tensor_parallel_size=policy.tensor_model_parallel_size,
            offload_weights=policy.free_gpu_memory.offload_weights,
            cores_per_process=cores["policy"],
            max_sequence_tokens=policy.max_prompt_tokens_length + policy.max_response_tokens_length,
        ),
        trainer=_trainer(config, cores["policy_trainer"]),
        training=PackingRule(data_ranks, trainer.packing, trainer.max_token_in_packing, micro_batch),
        reference=_reference(config, cores["ref_policy"]) if "ref_policy" in cores else None,
        base_is_reference=base_is_reference(config),
        num_graders=reward.num_cpu // reward.cpu_per_process,
        colocated=any({"policy", "policy_trainer"} <= set(group.roles) for group in groups),
        groups=groups,
        arrangement=arrangement,
        overlaps=overlaps,
        folders=_folders(config),
    )


def _arrangement(
    config: GrpoConfig, groups: Sequence[DeviceGroup], kind: DeviceKind, environment: Environment
) -> Arrangement:
    """Who gets which device. What a node without GPUs holds is known to its cluster alone."""
    width = config.models.policy.tensor_model_parallel_size
    if kind == "cpu":
        return arrange_anywhere(groups, width, environment.num_nodes)
    problems = placement_problems(config, groups, environment)
    if problems:
        raise ConfigError(*problems)
    arrangement = arrange(groups, width, environment.num_nodes, environment.gpus_per_node)
    if arrangement is None:
        raise ConfigError(torn_engines(config, environment))
    return arrangement


def _cores(kind: DeviceKind, arrangement: Arrangement, overlaps: bool, environment: Environment) -> dict[str, int]:
    """Cores for each process of each role (of an engine: for each of its devices).

    On the CPU roles take turns, so a role may use every core, divided by its own processes; where engines generate
    while others compute, each side has its part. On a GPU machine the processes of a GPU share that GPU's part.
    """
    if kind == "cuda":
        return dict.fromkeys(arrangement.processes, max(1, environment.cores // max(arrangement.blocks)))
    split = (side_by_side if overlaps else taking_turns)(range(environment.cores))
    sides = {role: split.engines if role == "policy" else split.learners for role in arrangement.processes}
    return {role: max(1, len(side) // arrangement.most_on_a_node(role)) for role, side in sides.items()}


def _trainer(config: GrpoConfig, cores_per_process: int) -> ShardedPlan:
    trainer = config.models.policy_trainer
    return ShardedPlan(
        load=trainer.load,
        num_ranks=trainer.num_gpu,
        fsdp_size=_or(trainer.fsdp_size, trainer.num_gpu),
        sequence_parallel_size=trainer.ulysses_sequence_parallel_size,
        meta_init=trainer.meta_init,
        groupgemm=trainer.groupgemm,
        use_expandable_segments=trainer.use_expandable_segments,
        offload_weights=trainer.free_gpu_memory.offload_weights,
        offload_optimizer_states=trainer.free_gpu_memory.offload_optimizer_states,
        keeps_on_host=trainer.optimizer.keep_on_host,
        takes_adapter=trainer.lora.rank > 0,
        cores_per_process=cores_per_process,
        scoring=PackingRule(
            trainer.num_gpu // trainer.ulysses_sequence_parallel_size,
            trainer.packing,
            trainer.max_token_in_packing,
            trainer.generation_batch_size,
        ),
    )


def _reference(config: GrpoConfig, cores_per_process: int) -> ShardedPlan:
    """What ``ref_policy`` leaves open is as for the trainer."""
    asked, trainer = config.models.ref_policy, config.models.policy_trainer
    num_ranks = _or(asked.num_gpu, trainer.num_gpu)
    # With fewer ranks than the trainer, the trainer's size may not fit; it changes no number, so what fits is taken.
    inherited = gcd(trainer.ulysses_sequence_parallel_size, num_ranks)
    sequence_parallel_size = _or(asked.ulysses_sequence_parallel_size, inherited)
    return ShardedPlan(
        load=_or(asked.load, trainer.load),
        num_ranks=num_ranks,
        fsdp_size=_or(asked.fsdp_size, num_ranks),
        sequence_parallel_size=sequence_parallel_size,
        meta_init=_or(asked.meta_init, trainer.meta_init),
        groupgemm=_or(asked.groupgemm, trainer.groupgemm),
        use_expandable_segments=_or(asked.use_expandable_segments, trainer.use_expandable_segments),
        offload_weights=asked.free_gpu_memory.offload_weights,
        offload_optimizer_states=False,  # It has none.
        keeps_on_host=False,
        takes_adapter=False,
        cores_per_process=cores_per_process,
        scoring=PackingRule(
            num_data_ranks=num_ranks // sequence_parallel_size,
            packing=_or(asked.packing, trainer.packing),
            max_tokens=_or(asked.max_token_in_packing, trainer.max_token_in_packing),
            micro_batch_size=_or(asked.generation_batch_size, trainer.generation_batch_size),
        ),
    )


def _or(asked: Item | None, otherwise: Item) -> Item:
    return otherwise if asked is None else asked


def _folders(config: GrpoConfig) -> Folders:
    runtime, log = config.runtime_args, config.runtime_args.log_args_dict
    output = Path(runtime.output_dir)
    log_dir = Path(log.log_dir) if log.log_dir else output
    return Folders(
        output=output,
        save_model=output / TRAINER_CHECKPOINTS,
        data_checkpoint=_path_or(runtime.data_checkpoint_path, output / "data_checkpoint_path"),
        tensorboard=_path_or(log.tensorboard_dir, log_dir / "tensorboard"),
        wandb=_path_or(log.wandb_dir, log_dir / "wandb"),
    )


def _path_or(asked: str | None, otherwise: Path) -> Path:
    return Path(asked) if asked else otherwise
