"""What a rank does in a trial: load the weights of the capsule, compute loss and gradient of its batch, tell."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from safetensors.torch import save_file

from chatlearn import device
from chatlearn.batch.pack import pack
from chatlearn.checkpoint.capsule import Capsule, read_adapter, read_capsule
from chatlearn.checkpoint.sharded import load_random_states
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.models.router_replay import share_agreeing
from chatlearn.trainer.adapter import load_adapter
from chatlearn.trainer.optimizer import gradient_norm
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.sharded_model import ShardedModel

if TYPE_CHECKING:
    from torch import Tensor

    from chatlearn.replay.trial import Trial


@dataclass(frozen=True)
class Measured:
    """The numbers of a step under the names a run reports them by, and how they were computed.

    ``not_finite`` names the parameters whose gradient is infinite or undefined.
    """

    loss: float
    grad_norm: float
    pg_loss: float
    kl_loss: float
    entropy: float
    clip_fraction: float
    rollout_logprob_diff_mean: float
    rollout_logprob_diff_max: float
    rollout_kl: float
    router_agreement: float | None
    num_tokens: int
    num_loss_tokens: int
    num_ranks: int
    dtype: str
    device: str
    not_finite: tuple[str, ...] = ()


def measure(trial: Trial) -> Measured:
    """Loss and gradient norm of the step, the same on every rank; collective. The weights stay as they are."""
    trainer, measured = _accumulated(trial)
    if math.isfinite(measured.grad_norm):
        return measured
    gradients = ((name, bool(gradient.isfinite().all())) for name, gradient in trainer.gradients())
    return replace(measured, not_finite=tuple(name for name, finite in gradients if not finite))


def measure_and_keep(trial: Trial, gradient_file: Path) -> Measured:
    """As ``measure``; rank 0 writes every gradient into ``gradient_file``, for which it holds them all at once."""
    trainer, measured = _accumulated(trial)
    kept: dict[str, Tensor] = {}
    for name, gradient in trainer.gradients():
        if dist.get_rank() == 0:
            # Experts come as views of one tensor; a file of tensors that share memory cannot be written.
            kept[name] = gradient.clone().contiguous()
    if dist.get_rank() == 0:
        save_file(kept, gradient_file)
    return measured


def _accumulated(trial: Trial) -> tuple[PolicyTrainer, Measured]:
    """The trainer with the gradient of the whole batch in it."""
    capsule = read_capsule(trial.directory)
    trainer = _load(trial, capsule)
    batch = pack(capsule.samples, trial.layout)
    if batch.num_loss_tokens == 0:
        raise ConfigError(f"{trial.directory}: no token of its samples is in the loss; there is nothing to compute")
    share = batch.ranks[trial.plan.data_rank(dist.get_rank())]
    sums = trainer.accumulate(share, batch.num_loss_tokens)
    parts = sums.parts
    measured = Measured(
        loss=parts.loss.item(),
        grad_norm=gradient_norm(trainer.model.module.parameters()),
        pg_loss=parts.pg_loss.item(),
        kl_loss=parts.kl_loss.item(),
        entropy=parts.entropy.item(),
        clip_fraction=parts.clip_fraction.item(),
        rollout_logprob_diff_mean=parts.rollout_logprob_diff_mean.item(),
        rollout_logprob_diff_max=sums.largest_rollout_difference.item(),
        rollout_kl=parts.rollout_kl.item(),
        router_agreement=share_agreeing(sums.routing),
        num_tokens=round(sums.num_tokens.item()),
        num_loss_tokens=batch.num_loss_tokens,
        num_ranks=trial.plan.num_ranks,
        dtype=trial.model.compute_dtype,
        device=trial.device_kind,
    )
    return trainer, measured


def _load(trial: Trial, capsule: Capsule) -> PolicyTrainer:
    """The trainer as it stood before the step, but for the optimizer's moments, which nothing here depends on."""
    # An earlier trial of this process goes first. Modules refer to themselves, so only the collector frees them.
    gc.collect()
    device.empty_cache(trial.device_kind)
    model = ShardedModel.load(trial.model, trial.plan, trainable=True)
    if trial.adapter_file is not None:
        _put_back(trial.adapter_file, model)
    if capsule.num_ranks == trial.plan.num_ranks:
        load_random_states(trial.directory, model.module)
    return PolicyTrainer(model, trial.optimizer, trial.objective)


def _put_back(adapter_file: Path, model: ShardedModel) -> None:
    """Give the model its adapter of before the step. The file is whole, so what does not fit is what was asked for."""
    kept = read_adapter(adapter_file)
    try:
        load_adapter(model.module, kept)
    except CheckpointError as error:
        raise ConfigError(
            f"models.policy_trainer.lora: {error}; leave rank and target_modules as they were in the run that recorded "
            f"{adapter_file}"
        ) from None
