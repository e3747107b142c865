"""What a step minimises, and the numbers it reports: one micro-batch's part of each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from chatlearn.algorithm.aggregate import token_mean
from chatlearn.algorithm.correction import Correction, importance_weights
from chatlearn.algorithm.kl import k3
from chatlearn.algorithm.loss import ClipRange, LossInputs, PolicyLoss, clip_fraction
from chatlearn.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from chatlearn.batch.pack import MicroBatch


@dataclass(frozen=True)
class Objective:
    """``policy loss + kl_coef * KL(policy || reference) - entropy_coef * entropy``, each a mean over loss tokens.

    ``correction`` weighs the policy loss of each token, and neither of the other two. The denominator stays the number
    of loss tokens, also of those that weigh nothing.
    """

    loss: PolicyLoss
    clip: ClipRange
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    correction: Correction | None = None


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of means over the loss tokens of the whole batch, scalars; added up over micro-batches they are the means.

    ``rollout_*`` compare the engine with the trainer on the same weights: they use the old log-probabilities, which
    are those of the weights that sampled. ``correction_*`` are means of the importance weights, which are 1 without a
    correction, of their squares, and of those that are 0. Only ``loss`` carries a gradient.
    """

    loss: Tensor
    pg_loss: Tensor
    kl_loss: Tensor
    entropy: Tensor
    clip_fraction: Tensor
    rollout_logprob_diff_mean: Tensor
    rollout_kl: Tensor
    correction_weight_mean: Tensor
    correction_weight_square_mean: Tensor
    correction_masked_ratio: Tensor

    def stacked(self) -> Tensor:
        """All numbers in one float64 vector without gradient, to be added up and sent in one piece."""
        return torch.stack([self.__dict__[entry.name].detach().double() for entry in fields(self)])


def objective_parts(
    objective: Objective, micro_batch: MicroBatch, logprobs: Tensor, entropy: Tensor, num_loss_tokens: int
) -> Parts:
    """Compare the current log-probabilities [T] with what the batch remembers."""
    old_logprobs = old_logprobs_of(micro_batch, logprobs)
    mask = micro_batch.loss_mask
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=micro_batch.advantages,
        loss_mask=mask,
        lengths=micro_batch.lengths,
    )
    rollout = micro_batch.rollout_logprobs
    correction = objective.correction
    weights = torch.ones_like(rollout) if correction is None else importance_weights(inputs, rollout, correction)
    pg_loss = token_mean(weights * loss_per_token(objective, inputs), mask, num_loss_tokens)
    if micro_batch.ref_logprobs is None:
        kl_loss = torch.zeros_like(pg_loss)
    else:
        reference = micro_batch.ref_logprobs.where(mask, logprobs.detach())
        kl_loss = token_mean(k3(logprobs, reference), mask, num_loss_tokens)
    # Without a weight on it the entropy is only watched, and its half of the backward pass is not computed.
    entropy_mean = token_mean(entropy if objective.entropy_coef else entropy.detach(), mask, num_loss_tokens)
    return Parts(
        loss=pg_loss + objective.kl_coef * kl_loss - objective.entropy_coef * entropy_mean,
        pg_loss=pg_loss,
        kl_loss=kl_loss,
        entropy=entropy_mean,
        clip_fraction=clip_fraction(objective.loss, inputs, objective.clip, num_loss_tokens),
        rollout_logprob_diff_mean=token_mean((rollout - old_logprobs).abs(), mask, num_loss_tokens),
        rollout_kl=token_mean(k3(rollout, old_logprobs), mask, num_loss_tokens),
        correction_weight_mean=token_mean(weights, mask, num_loss_tokens),
        correction_weight_square_mean=token_mean(weights.square(), mask, num_loss_tokens),
        correction_masked_ratio=token_mean((weights == 0).to(weights.dtype), mask, num_loss_tokens),
    )


def loss_per_token(objective: Objective, inputs: LossInputs) -> Tensor:
    """The policy loss, [T]. One of a user's own that is averaged already would be weighed anew for every token."""
    losses = objective.loss(inputs, objective.clip)
    if losses.shape != inputs.logprobs.shape:
        raise ConfigError(
            f"models.policy_trainer.loss: the function returned a tensor of shape {tuple(losses.shape)} for "
            f"{len(inputs.logprobs)} tokens; return one number per token, the trainer averages them itself"
        )
    return losses


def old_logprobs_of(micro_batch: MicroBatch, logprobs: Tensor) -> Tensor:
    """What the batch remembers; or, in the only step of an episode, the current ones: they are the old ones."""
    return logprobs.detach() if micro_batch.old_logprobs is None else micro_batch.old_logprobs


def largest_rollout_difference(micro_batch: MicroBatch, logprobs: Tensor) -> Tensor:
    """The largest gap between engine and trainer on one loss token of the micro-batch, a scalar; 0 without any."""
    gaps = (micro_batch.rollout_logprobs - old_logprobs_of(micro_batch, logprobs)).abs()
    return gaps.masked_fill(~micro_batch.loss_mask, 0.0).max().detach()
