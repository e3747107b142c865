"""A sharded model with an optimizer: one call, one step."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule

from chatlearn.records import StepStats
from chatlearn.trainer.objective import Objective, Parts, largest_rollout_difference, objective_parts
from chatlearn.trainer.optimizer import OptimizerSpec, apply_gradients, build_optimizer
from chatlearn.trainer.parallel import maximum_over_ranks, sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from chatlearn.batch.pack import MicroBatch
    from chatlearn.trainer.sharded_model import ShardedModel


NUM_SUMS = len(fields(Parts)) + 1  # and the number of tokens


class PolicyTrainer:
    """Trains the weights of ``model``; ``optimizer`` holds the state that a checkpoint must carry with them."""

    def __init__(self, model: ShardedModel, optimizer: OptimizerSpec, objective: Objective) -> None:
        self.model = model
        self.optimizer_spec = optimizer
        self.objective = objective
        self.optimizer = build_optimizer(model.module.parameters(), optimizer)

    def step(self, micro_batches: Sequence[MicroBatch], num_loss_tokens: int, iteration: int) -> StepStats:
        """One optimizer step on the batch of which these are this rank's micro-batches; collective.

        ``num_loss_tokens`` counts the loss tokens of all ranks, ``iteration`` the steps of the run from 1. The result
        is the same on every rank. When the gradient is not finite, ``grad_norm`` is not either, and the weights stay
        as they were.
        """
        assert num_loss_tokens > 0, "a batch without loss tokens has nothing to learn from; leave the step out"
        self.model.module.train()
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=self.model.device)
        largest = torch.zeros((), device=self.model.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            self._prepare_backward(is_last=number == len(micro_batches))
            here = micro_batch.to(self.model.device)
            logprobs, entropy = self.model.score(here)
            parts = objective_parts(self.objective, here, logprobs, entropy, num_loss_tokens)
            parts.loss.backward()
            largest = torch.maximum(largest, largest_rollout_difference(here, logprobs))
            sums += torch.cat([parts.stacked(), sums.new_tensor([num_real_tokens(micro_batch)])])
        grad_norm = apply_gradients(self.optimizer, self.optimizer_spec)
        return self._stats(sum_over_ranks(sums), maximum_over_ranks(largest), grad_norm, num_loss_tokens)

    def _prepare_backward(self, *, is_last: bool) -> None:
        """Say whether the coming backward pass sends its gradients, or keeps them whole for the next one to add to.

        A large model always sends: its whole gradient would not fit.
        """
        communicates = is_last or not self.model.stays_whole
        module = self.model.module
        assert isinstance(module, FSDPModule), "build() shards the whole module"
        module.set_requires_gradient_sync(communicates)
        module.set_reshard_after_backward(communicates)

    def _stats(self, sums: Tensor, largest: Tensor, grad_norm: float, num_loss_tokens: int) -> StepStats:
        *means, num_tokens = sums.cpu().unbind()
        whole = Parts(*means)
        return StepStats(
            loss=whole.loss.item(),
            pg_loss=whole.pg_loss.item(),
            kl_loss=whole.kl_loss.item(),
            entropy=whole.entropy.item(),
            grad_norm=grad_norm,
            clip_fraction=whole.clip_fraction.item(),
            lr=self.optimizer.param_groups[0]["lr"],
            num_tokens=round(num_tokens.item()),
            num_loss_tokens=num_loss_tokens,
            rollout_logprob_diff_mean=whole.rollout_logprob_diff_mean.item(),
            rollout_logprob_diff_max=largest.item(),
            rollout_kl=whole.rollout_kl.item(),
        )


def num_real_tokens(micro_batch: MicroBatch) -> int:
    """Tokens of samples; a filler has none."""
    return micro_batch.num_tokens if micro_batch.samples else 0
