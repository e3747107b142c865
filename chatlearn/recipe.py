"""From what a user wrote to what a trainer is built from; needs neither Ray nor an engine, so a replay reads it too."""

from __future__ import annotations

from pathlib import Path

from chatlearn import device
from chatlearn.algorithm.loss import POLICY_LOSSES, ClipRange
from chatlearn.batch.plan import BatchLayout
from chatlearn.config.layout import Layout, PackingRule, ShardedPlan
from chatlearn.config.resolve import resolve
from chatlearn.config.schema import GrpoConfig
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.objective import Objective
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.parallel import ParallelPlan


def model_spec(config: GrpoConfig, layout: Layout, plan: ShardedPlan) -> ModelSpec:
    """The model of the trainer or of the reference; both score at the temperature that was sampled with."""
    trainer = config.models.policy_trainer
    return ModelSpec(
        path=Path(plan.load),
        compute_dtype=device.compute_dtype(layout.device_kind),
        temperature=config.models.policy.temperature,
        checkpointing="full" if trainer.gradient_checkpointing else "off",
        grouped_experts=plan.groupgemm,
        meta_init=plan.meta_init,
        trust_remote_code=trainer.trust_remote_code,
    )


def parallel_plan(plan: ShardedPlan) -> ParallelPlan:
    """One copy of the model in shards over all ranks."""
    return ParallelPlan(num_ranks=plan.num_ranks, fsdp_size=plan.num_ranks)


def batch_layout(rule: PackingRule) -> BatchLayout:
    """How batches of one model are cut."""
    return BatchLayout(rule.num_data_ranks, rule.packing, rule.max_tokens, rule.micro_batch_size)


def optimizer_spec(config: GrpoConfig) -> OptimizerSpec:
    """AdamW as asked for."""
    asked = config.models.policy_trainer.optimizer
    return OptimizerSpec(asked.lr, asked.weight_decay, asked.adam_beta1, asked.adam_beta2, asked.clip_grad)


def objective(config: GrpoConfig) -> Objective:
    """The loss with its clip range and its two optional terms."""
    trainer = config.models.policy_trainer
    return Objective(
        loss=resolve(POLICY_LOSSES, trainer.loss, "models.policy_trainer.loss"),
        clip=ClipRange(
            low=trainer.neg_clip_ratio,
            high=trainer.pos_clip_ratio,
            max_log_ratio=trainer.diff_clip_ratio,
            dual=trainer.final_clip_ratio,
        ),
        kl_coef=trainer.kl_coef,
        entropy_coef=trainer.entropy_coef,
    )
