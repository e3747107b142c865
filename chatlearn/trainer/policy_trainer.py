"""A sharded model with an optimizer: one call, one step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule

from chatlearn.algorithm.correction import effective_sample_share
from chatlearn.models.router_replay import RouterTally, share_agreeing
from chatlearn.records import StepStats
from chatlearn.trainer.load import whole
from chatlearn.trainer.objective import Objective, Parts, largest_rollout_difference, objective_parts
from chatlearn.trainer.optimizer import OptimizerSpec, apply_gradients, build_optimizer
from chatlearn.trainer.out_of_memory import advice_about, advice_about_update
from chatlearn.trainer.parallel import maximum_over_ranks, sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from chatlearn.batch.pack import MicroBatch
    from chatlearn.trainer.sharded_model import ShardedModel


NUM_SUMS = len(fields(Parts)) + 1  # and the number of tokens


@dataclass(frozen=True, eq=False)
class StepSums:
    """What a batch adds up to over all micro-batches and ranks: scalars, left on the device until somebody reads them.

    ``num_tokens`` counts all tokens of samples, whether they are in the loss or not. ``routing`` counts the engine's
    choices of experts that the routers make too, and all that were compared.
    """

    parts: Parts
    num_tokens: Tensor
    largest_rollout_difference: Tensor
    routing: Tensor  # [2]


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
        sums = self.accumulate(micro_batches, num_loss_tokens)
        with advice_about_update():
            grad_norm = apply_gradients(self.optimizer, self.optimizer_spec, iteration)
        return self._stats(sums, grad_norm, num_loss_tokens)

    def accumulate(self, micro_batches: Sequence[MicroBatch], num_loss_tokens: int) -> StepSums:
        """Forward and backward over this rank's micro-batches; the gradient of the whole batch is then in ``.grad``.

        Collective; the result is the same on every rank.
        """
        assert num_loss_tokens > 0, "a batch without loss tokens has nothing to learn from; leave the step out"
        self.model.module.train()
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=self.model.device)
        largest = torch.zeros((), device=self.model.device)
        tally = RouterTally()
        for number, micro_batch in enumerate(micro_batches, start=1):
            self._prepare_backward(is_last=number == len(micro_batches))
            with advice_about(micro_batch):
                here = micro_batch.to(self.model.device)
                logprobs, entropy = self.model.score(here, tally)
                parts = objective_parts(self.objective, here, logprobs, entropy, num_loss_tokens)
                parts.loss.backward()
            largest = torch.maximum(largest, largest_rollout_difference(here, logprobs))
            if self.model.counts:
                sums += torch.cat([parts.stacked(), sums.new_full((1,), num_real_tokens(micro_batch))])
        *means, num_tokens = sum_over_ranks(sums).unbind()
        # Each rank of a sequence group routes a slice of the tokens, so here all of them count.
        routing = sum_over_ranks(tally.sums(self.model.device))
        return StepSums(Parts(*means), num_tokens, maximum_over_ranks(largest), routing)

    @torch.no_grad()
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """After ``accumulate``: every gradient whole, float32 on the host, under its Hugging Face name; collective.

        Only parameters that are trained have one; where none arrived (an expert without tokens) it is zero. One
        parameter is in memory at a time. ``optimizer.zero_grad()`` forgets them all.
        """
        for name, parameter in self.model.module.named_parameters():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                yield from self.model.family.export(name, whole(gradient).float().cpu())

    def _prepare_backward(self, *, is_last: bool) -> None:
        """Say whether the coming backward pass sends its gradients, or keeps them whole for the next one to add to.

        A large model always sends: its whole gradient would not fit. Replicas add up their shards of it once, at the
        end; not where shards live on the host, for until then they are on the device.
        """
        communicates = is_last or not self.model.stays_whole
        module = self.model.module
        assert isinstance(module, FSDPModule), "build() shards the whole module"
        module.set_requires_gradient_sync(communicates)
        module.set_requires_all_reduce(is_last or self.model.spec.on_host)
        module.set_reshard_after_backward(communicates)

    def _stats(self, sums: StepSums, grad_norm: float, num_loss_tokens: int) -> StepStats:
        means = sums.parts
        weight_mean, corrects = means.correction_weight_mean.item(), self.objective.correction is not None
        ess = effective_sample_share(weight_mean, means.correction_weight_square_mean.item())
        return StepStats(
            loss=means.loss.item(),
            pg_loss=means.pg_loss.item(),
            kl_loss=means.kl_loss.item(),
            entropy=means.entropy.item(),
            grad_norm=grad_norm,
            clip_fraction=means.clip_fraction.item(),
            lr=self.optimizer.param_groups[0]["lr"],
            num_tokens=round(sums.num_tokens.item()),
            num_loss_tokens=num_loss_tokens,
            rollout_logprob_diff_mean=means.rollout_logprob_diff_mean.item(),
            rollout_logprob_diff_max=sums.largest_rollout_difference.item(),
            rollout_kl=means.rollout_kl.item(),
            router_agreement=share_agreeing(sums.routing),
            correction_ess=ess if corrects else None,
            correction_masked_ratio=means.correction_masked_ratio.item() if corrects else None,
            correction_weight_mean=weight_mean if corrects else None,
        )


def num_real_tokens(micro_batch: MicroBatch) -> int:
    """Tokens of samples; a filler has none."""
    return micro_batch.num_tokens if micro_batch.samples else 0
