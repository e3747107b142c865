"""What can only be checked with the libraries that will do the work: models, and the functions that a user names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import torch
from transformers import PreTrainedConfig

from chatlearn.algorithm.advantage import ADVANTAGES
from chatlearn.algorithm.loss import POLICY_LOSSES
from chatlearn.config.layout import Layout, ShardedPlan
from chatlearn.config.resolve import resolve
from chatlearn.config.schema import GrpoConfig
from chatlearn.errors import ConfigError
from chatlearn.models.family import family_of
from chatlearn.models.naming import ModelFamily
from chatlearn.models.positions import require_fixed_frequencies
from chatlearn.models.pretrained import read_configuration
from chatlearn.recipe import model_spec
from chatlearn.reward.grade import REWARDS
from chatlearn.rollout.engine import ENGINES
from chatlearn.trainer.build import assemble
from chatlearn.trainer.parallel import sequence_parallel_problem

ShardedRole = Literal["policy_trainer", "ref_policy"]
TRAINER: Final = "models.policy_trainer"


def check_models(config: GrpoConfig, layout: Layout) -> None:
    """Find the family of every model that will be loaded, and ask what its configuration says about the wishes.

    Raises one ``ConfigError`` with everything that does not fit the models.
    """
    plans: dict[ShardedRole, ShardedPlan | None] = {"policy_trainer": layout.trainer, "ref_policy": layout.reference}
    problems: list[str] = []
    for role, plan in plans.items():
        if plan is not None:
            family = family_of(Path(plan.load))
            described = read_configuration(
                f"models.{role}.load",
                Path(plan.load),
                trust_remote_code=config.models.policy_trainer.trust_remote_code,
            )
            require_fixed_frequencies(described, Path(plan.load))
            problems += _plan_problems(role, plan, family, described)
    trained = family_of(Path(layout.trainer.load))
    problems += _trainer_problems(config, trained)
    problems += _adapter_problems(config, layout, trained)
    if problems:
        raise ConfigError(*problems)


def _plan_problems(role: ShardedRole, plan: ShardedPlan, family: ModelFamily, described: PreTrainedConfig) -> list[str]:
    problems: list[str] = []
    if plan.groupgemm and family.experts is None:
        problems.append(
            f"models.{role}.groupgemm=True is for mixtures of experts, and {plan.load} is a "
            f"{family.architecture}; use False"
        )
    problem = sequence_parallel_problem(plan.sequence_parallel_size, plan.num_ranks, described.num_attention_heads)
    return problems if problem is None else [*problems, f"models.{role}.{problem}"]


def _trainer_problems(config: GrpoConfig, family: ModelFamily) -> list[str]:
    trainer = config.models.policy_trainer
    if trainer.router_replay is not False and family.experts is None:
        return [
            f"{TRAINER}.router_replay={trainer.router_replay} is for mixtures of experts, and {trainer.load} is a "
            f"{family.architecture}; use False"
        ]
    return []


def _adapter_problems(config: GrpoConfig, layout: Layout, family: ModelFamily) -> list[str]:
    """Whether the model has the layers that are to be adapted. Only the module knows, so it is built without memory."""
    spec = model_spec(config, layout, layout.trainer)
    if spec.lora is None or not spec.lora.target_modules:
        return []
    try:
        assemble(spec, family, torch.float32)
    except ConfigError as error:
        return list(error.problems)
    return []


def check_names(config: GrpoConfig) -> None:
    """Find every extension point that the configuration names."""
    runtime, models = config.runtime_args, config.models
    asked: tuple[tuple[Mapping[str, object], str | None, str], ...] = (
        (ADVANTAGES, runtime.advantage, "runtime_args.advantage"),
        (ENGINES, runtime.rollout_backend, "runtime_args.rollout_backend"),
        (POLICY_LOSSES, models.policy_trainer.loss, "models.policy_trainer.loss"),
        (REWARDS, models.reward.function, "models.reward.function"),
    )
    for table, name, key in asked:
        if name is None:
            continue
        try:
            resolve(table, name, key)
        except SystemExit as end:  # A script without a guard; its status, often 0, would pass for that of a run.
            raise ConfigError(
                f"{key}={name}: its module ends the process when it is imported (status {end.code}); "
                "guard that with if __name__ == '__main__'"
            ) from end
