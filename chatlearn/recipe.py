"""From what a user wrote to what a trainer is built from; needs neither Ray nor an engine, so a replay reads it too."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from chatlearn import device
from chatlearn.algorithm.correction import BOUNDS, Correction, Level, Mode
from chatlearn.algorithm.loss import POLICY_LOSSES, ClipRange
from chatlearn.batch.plan import BatchLayout, attention_crossover_tokens
from chatlearn.checkpoint.architecture import parameter_shapes
from chatlearn.config.checks import total_iterations
from chatlearn.config.layout import Layout, PackingRule, ShardedPlan
from chatlearn.config.resolve import resolve
from chatlearn.config.schema import GrpoConfig
from chatlearn.models.family import family_of
from chatlearn.models.lora import LoraSpec
from chatlearn.models.pretrained import read_configuration
from chatlearn.models.work import attention_width, parameters_met
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.objective import Objective
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.parallel import ParallelPlan
from chatlearn.trainer.recompute import Checkpointing
from chatlearn.trainer.schedule import Schedule

# What may be written for ``gradient_checkpointing``, and what it is called here.
CHECKPOINTING: Final[dict[bool | str, Checkpointing]] = {True: "full", False: "off", "selective": "selective"}


def model_spec(config: GrpoConfig, layout: Layout, plan: ShardedPlan) -> ModelSpec:
    """The model of the trainer or of the reference; both score at the temperature that was sampled with."""
    trainer = config.models.policy_trainer
    return ModelSpec(
        path=Path(plan.load),
        compute_dtype=device.compute_dtype(layout.device_kind),
        temperature=config.models.policy.temperature,
        checkpointing=CHECKPOINTING[trainer.gradient_checkpointing],
        grouped_experts=plan.groupgemm,
        meta_init=plan.meta_init,
        on_host=plan.keeps_on_host,
        lora=lora_spec(config) if plan.takes_adapter else None,
        router_replay=trainer.router_replay not in (False, "compare"),
        trust_remote_code=trainer.trust_remote_code,
    )


def parallel_plan(plan: ShardedPlan) -> ParallelPlan:
    """How the ranks share weights and sequences."""
    return ParallelPlan(plan.num_ranks, plan.fsdp_size, plan.sequence_parallel_size)


def batch_layout(rule: PackingRule, model_dir: Path) -> BatchLayout:
    """How batches of the model in ``model_dir`` are cut; it decides from which length on attention is what costs."""
    return BatchLayout(
        rule.num_data_ranks, rule.packing, rule.max_tokens, rule.micro_batch_size, crossover_of(model_dir)
    )


@cache
def crossover_of(model_dir: Path) -> int:
    """The length from which on attention is what costs; training, scoring and the reference often share the model."""
    described = read_configuration("model", model_dir, trust_remote_code=False)
    return attention_crossover_tokens(
        parameters_met(parameter_shapes(model_dir), family_of(model_dir), described),
        described.num_hidden_layers,
        attention_width(described),
    )


def optimizer_spec(config: GrpoConfig) -> OptimizerSpec:
    """AdamW as asked for, with a schedule over all steps of the run."""
    asked = config.models.policy_trainer.optimizer
    return OptimizerSpec(
        lr=asked.lr,
        weight_decay=asked.weight_decay,
        beta1=asked.adam_beta1,
        beta2=asked.adam_beta2,
        clip_grad=asked.clip_grad,
        decay_norms_and_biases=asked.decay_norms_and_biases,
        state_dtype=asked.state_dtype,
        schedule=Schedule(asked.schedule, asked.warmup_iterations, asked.min_lr, total_iterations(config)),
    )


def lora_spec(config: GrpoConfig) -> LoraSpec | None:
    """The adapter to train; ``None`` where all weights are trained."""
    asked = config.models.policy_trainer.lora
    return LoraSpec(asked.rank, asked.alpha, asked.target_modules) if asked.rank > 0 else None


def correction(config: GrpoConfig) -> Correction | None:
    """How answers of another distribution are weighed; ``None`` where nothing was asked for."""
    asked = config.models.policy_trainer.rollout_correction
    if asked.token == asked.sequence == "off":
        return None
    token_low, token_high = bounds("token", asked.token, asked.token_low, asked.token_high)
    sequence_low, sequence_high = bounds("sequence", asked.sequence, asked.sequence_low, asked.sequence_high)
    return Correction(asked.token, token_low, token_high, asked.sequence, sequence_low, sequence_high)


def bounds(level: Level, mode: Mode, low: float | None, high: float | None) -> tuple[float, float]:
    """The bounds that were asked for; what is absent depends on what they are for."""
    usual_low, usual_high = BOUNDS[level, mode]
    return usual_low if low is None else low, usual_high if high is None else high


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
        correction=correction(config),
    )
