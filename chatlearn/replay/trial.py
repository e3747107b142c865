"""From a capsule and what a user asks for today to a trial: one way to compute the recorded step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Final

from chatlearn import recipe
from chatlearn.batch.plan import BatchLayout
from chatlearn.checkpoint.capsule import Capsule
from chatlearn.config.environment import Environment, usable_cores, visible_gpus
from chatlearn.config.layout import layout_of
from chatlearn.config.read import read_config
from chatlearn.config.schema import GrpoConfig
from chatlearn.device import DeviceKind
from chatlearn.errors import ConfigError
from chatlearn.models.family import family_of
from chatlearn.models.naming import ModelFamily
from chatlearn.models.pretrained import read_configuration
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.objective import Objective
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.parallel import ParallelPlan

TRAINER: Final = "models.policy_trainer"
REFERENCE: Final = "models.ref_policy"

# Only the trainer is built here. Where a run's other roles would go is no matter, so they always find a place.
ROOM_FOR_ALL: Final = 2**20


@dataclass(frozen=True)
class Trial:
    """One way to compute the step of the capsule in ``directory``; ranks read samples and weights from there."""

    directory: Path
    adapter_file: Path | None
    device_kind: DeviceKind
    model: ModelSpec
    plan: ParallelPlan
    layout: BatchLayout
    objective: Objective
    optimizer: OptimizerSpec


def trial_of(capsule: Capsule, overrides: Sequence[str], num_ranks: int) -> Trial:
    """The step as the run's configuration and ``key=value`` overrides describe it, on ``num_ranks`` ranks.

    What the run spread over its ranks is fitted to today's, unless an override says otherwise. Data, output and the
    engines of the run are not looked at. Raises ``ConfigError`` for overrides that are wrong or cannot be had here.
    """
    family = family_of(capsule.model_dir)
    written = _recorded_config(capsule)
    config = read_config(capsule.config_file, [*fitting_words(written, num_ranks), *overrides])
    _require_own_weights(capsule, written, config)
    _require_possible(capsule, config, num_ranks)
    _require_experts(capsule, config, family)
    read_configuration(
        "the capsule", capsule.model_dir, trust_remote_code=config.models.policy_trainer.trust_remote_code
    )
    environment = Environment(gpus_per_node=ROOM_FOR_ALL if visible_gpus() else 0, cores=usable_cores())
    layout = layout_of(config, environment)
    return Trial(
        directory=capsule.directory,
        adapter_file=capsule.adapter_file,
        device_kind=layout.device_kind,
        model=replace(recipe.model_spec(config, layout, layout.trainer), path=capsule.model_dir),
        plan=recipe.parallel_plan(layout.trainer),
        layout=recipe.batch_layout(layout.training, capsule.model_dir),
        objective=recipe.objective(config),
        optimizer=recipe.optimizer_spec(config),
    )


def fitting_words(config: GrpoConfig, num_ranks: int) -> list[str]:
    """Overrides that let a configuration for any number of ranks run on ``num_ranks``: sizes shrink to divisors.

    Code that lies in the model directory is not run unless the user says so again: capsules are passed on.
    """
    trainer = config.models.policy_trainer
    return [
        f"{TRAINER}.num_gpu={num_ranks}",
        f"{TRAINER}.fsdp_size={gcd(trainer.fsdp_size or num_ranks, num_ranks)}",
        f"{TRAINER}.ulysses_sequence_parallel_size={gcd(trainer.ulysses_sequence_parallel_size, num_ranks)}",
        f"{TRAINER}.trust_remote_code=False",
        f"{REFERENCE}.num_gpu={num_ranks}",
        f"{REFERENCE}.fsdp_size={num_ranks}",
        f"{REFERENCE}.ulysses_sequence_parallel_size=1",
        "runtime_args.colocation=[]",
    ]


def _recorded_config(capsule: Capsule) -> GrpoConfig:
    """The configuration of the run. It may have been edited since, so what is wrong with it names the file."""
    try:
        return read_config(capsule.config_file)
    except ConfigError as error:
        file = str(capsule.config_file)
        raise ConfigError(*(text if file in text else f"{file}: {text}" for text in error.problems)) from None


def _require_own_weights(capsule: Capsule, written: GrpoConfig, config: GrpoConfig) -> None:
    """What is replayed are the weights before the step; whoever names others would get these without a word."""
    load = config.models.policy_trainer.load
    if load != written.models.policy_trainer.load:
        raise ConfigError(
            f"{TRAINER}.load={load} has no effect: the weights of the step are in {capsule.model_dir}; leave the key "
            "out"
        )


def _require_possible(capsule: Capsule, config: GrpoConfig, num_ranks: int) -> None:
    trainer = config.models.policy_trainer
    if trainer.num_gpu != num_ranks:
        raise ConfigError(
            f"{TRAINER}.num_gpu={trainer.num_gpu} asks for other ranks than the {num_ranks} connected; start it with "
            f"torchrun --nproc-per-node {trainer.num_gpu} -m chatlearn replay {capsule.directory}, or leave it out"
        )
    if config.runtime_args.device == "cuda" and not visible_gpus():
        raise ConfigError(
            "runtime_args.device=cuda, here or in the run, and this machine shows no GPU; add runtime_args.device=cpu"
        )
    if trainer.kl_coef > 0 and any(sample.ref_logprobs is None for sample in capsule.samples):
        raise ConfigError(
            f"{TRAINER}.kl_coef={trainer.kl_coef} needs log-probabilities of the reference model, and the capsule "
            f"{capsule.directory} has none; use {TRAINER}.kl_coef=0"
        )
    if (trainer.lora.rank > 0) != (capsule.adapter_file is not None):
        has = "has no adapter" if capsule.adapter_file is None else "was recorded with one"
        raise ConfigError(
            f"{TRAINER}.lora.rank={trainer.lora.rank}: the capsule {capsule.directory} {has}; leave the key out"
        )


def _require_experts(capsule: Capsule, config: GrpoConfig, family: ModelFamily) -> None:
    """What is for mixtures of experts would have no effect on another model, nor would routes that nobody recorded."""
    trainer = config.models.policy_trainer
    for name, value in (("groupgemm", trainer.groupgemm), ("router_replay", trainer.router_replay)):
        if value is not False and family.experts is None:
            raise ConfigError(
                f"{TRAINER}.{name}={value} is for mixtures of experts, and the capsule {capsule.directory} holds a "
                f"{family.architecture}; use False"
            )
    if trainer.router_replay is not False and any(sample.routed_experts is None for sample in capsule.samples):
        raise ConfigError(
            f"{TRAINER}.router_replay={trainer.router_replay} needs the experts that the engine chose, and the capsule "
            f"{capsule.directory} has none; use False"
        )
