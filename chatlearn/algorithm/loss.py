"""Policy losses: token log-probabilities and advantages of whole sequences to one loss per token.

A loss function is ``(LossInputs, ClipRange) -> Tensor [T]`` and knows nothing of ranks, packing or denominators:
``aggregate.token_mean`` divides by the number of loss tokens of the whole batch. What it returns where the mask is
False is never used. To add one, write a function and a row in ``POLICY_LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chatlearn.device import to_device


@dataclass(frozen=True)
class ClipRange:
    """How far the new policy may move from the old one before a token stops pulling it.

    The ratio new/old is clipped to ``[1 - low, 1 + high]``; its logarithm is cut at ``max_log_ratio`` against
    overflow. ``dual`` bounds the ratio of tokens with a negative advantage, whose loss is otherwise unbounded
    (dual-clip PPO, arXiv:1912.09729). It bounds the ratio and not the loss, so that a strongly negative sample of
    the current policy, whose ratio is one, keeps its gradient.
    """

    low: float
    high: float
    max_log_ratio: float
    dual: float


@dataclass(frozen=True, eq=False)
class LossInputs:
    """Whole sequences end to end, by prediction; T is the sum of ``lengths``. Only ``logprobs`` carries a gradient."""

    logprobs: Tensor  # [T]
    old_logprobs: Tensor  # [T]
    advantages: Tensor  # [T]
    loss_mask: Tensor  # [T], bool
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = (sum(self.lengths),)
        streams = (self.logprobs, self.old_logprobs, self.advantages, self.loss_mask)
        assert all(values.shape == shape for values in streams), f"every stream must have the shape {shape}"


PolicyLoss = Callable[[LossInputs, ClipRange], Tensor]


def clipped_surrogate(inputs: LossInputs, clip: ClipRange) -> Tensor:
    """PPO's clipped objective per token, as GRPO uses it (arXiv:1707.06347, arXiv:2402.03300)."""
    return surrogate(token_log_ratio(inputs), inputs.advantages, clip)


def sequence_surrogate(inputs: LossInputs, clip: ClipRange) -> Tensor:
    """GSPO: every token of a sequence is clipped by the sequence's mean log-ratio (arXiv:2507.18071).

    This is the paper's token form: the value is the sequence's ratio, the gradient flows through each token.
    """
    log_ratio = token_log_ratio(inputs)
    through_token = log_ratio - log_ratio.detach()
    return surrogate(through_token + sequence_mean(log_ratio.detach(), inputs), inputs.advantages, clip)


def token_log_ratio(inputs: LossInputs) -> Tensor:
    """log(new / old) of every loss token, zero without gradient elsewhere, [T]."""
    return (inputs.logprobs - inputs.old_logprobs).masked_fill(~inputs.loss_mask, 0.0)


def sequence_mean(values: Tensor, inputs: LossInputs) -> Tensor:
    """The mean over the loss tokens of each sequence, at every position of it; ``values`` are zero elsewhere, [T]."""
    counts = sequence_sum(inputs.loss_mask.to(values.dtype), inputs.lengths)
    # A sequence without loss tokens has the mean zero.
    return sequence_sum(values, inputs.lengths) / counts.clamp(min=1)


def sequence_sum(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The sum of ``values`` over each sequence, at every position of it, [T]."""
    widths = to_device(torch.tensor(lengths), values.device)
    sequence = torch.repeat_interleave(widths, output_size=values.numel())  # [T], which sequence a token is in
    return values.new_zeros(len(lengths)).index_add(0, sequence, values)[sequence]


def surrogate(log_ratio: Tensor, advantages: Tensor, clip: ClipRange) -> Tensor:
    """The pessimistic of the plain and the clipped objective, bounded for negative advantages, [T]."""
    ratio = log_ratio.clamp(max=clip.max_log_ratio).exp()
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    bounded = torch.minimum(loss, -advantages * clip.dual)
    return torch.where(advantages < 0, bounded, loss)


def clip_fraction(policy_loss: PolicyLoss, inputs: LossInputs, clip: ClipRange, num_loss_tokens: int) -> Tensor:
    """The share of loss tokens that have an advantage but get no gradient, because clipping took it.

    This is a micro-batch's part: the parts of all micro-batches of all ranks add up to the share in the batch. It
    asks the loss itself, so it is right for every loss, also for one of a user.
    """
    with torch.enable_grad():
        leaf = inputs.logprobs.detach().requires_grad_()
        loss = policy_loss(replace(inputs, logprobs=leaf), clip)
        (gradient,) = torch.autograd.grad((loss * inputs.loss_mask).sum(), leaf)
    return ((gradient == 0) & (inputs.advantages != 0) & inputs.loss_mask).sum() / num_loss_tokens


POLICY_LOSSES: dict[str, PolicyLoss] = {"grpo": clipped_surrogate, "gspo": sequence_surrogate}
