"""What every policy loss must keep, ours and a user's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from chatlearn.algorithm.aggregate import token_mean
from chatlearn.algorithm.loss import POLICY_LOSSES, ClipRange, LossInputs, PolicyLoss

CLIP = ClipRange(low=0.2, high=0.28, max_log_ratio=10.0, dual=3.0)
LENGTHS = (5, 1, 7, 3)


@pytest.fixture(params=sorted(POLICY_LOSSES))
def policy_loss(request: pytest.FixtureRequest) -> PolicyLoss:
    return POLICY_LOSSES[request.param]


def some_inputs(seed: int = 0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    size = sum(LENGTHS)
    per_sequence = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    return LossInputs(
        logprobs=-torch.rand(size, generator=generator, dtype=torch.float64) * 3,
        old_logprobs=-torch.rand(size, generator=generator, dtype=torch.float64) * 3,
        advantages=per_sequence.repeat_interleave(torch.tensor(LENGTHS)),
        loss_mask=torch.rand(size, generator=generator) > 0.3,
        lengths=LENGTHS,
    )


def gradient(policy_loss: PolicyLoss, inputs: LossInputs, num_loss_tokens: int) -> torch.Tensor:
    leaf = inputs.logprobs.clone().requires_grad_()
    loss = token_mean(policy_loss(replace(inputs, logprobs=leaf), CLIP), inputs.loss_mask, num_loss_tokens)
    (grad,) = torch.autograd.grad(loss, leaf)
    return grad


def test_the_loss_is_one_finite_number_per_token(policy_loss: PolicyLoss) -> None:
    inputs = some_inputs()
    loss = policy_loss(inputs, CLIP)
    assert loss.shape == inputs.logprobs.shape
    assert torch.isfinite(loss[inputs.loss_mask]).all()


def test_at_ratio_one_the_gradient_is_reinforce(policy_loss: PolicyLoss) -> None:
    inputs = some_inputs()
    on_policy = replace(inputs, old_logprobs=inputs.logprobs.clone())
    expected = torch.where(inputs.loss_mask, -inputs.advantages / 10, 0.0)
    torch.testing.assert_close(gradient(policy_loss, on_policy, 10), expected)


def test_gradient_does_not_depend_on_packing(policy_loss: PolicyLoss) -> None:
    """Any order of the sequences, and any cut between them into micro-batches, gives the same gradients."""
    inputs = some_inputs()
    num_loss_tokens = int(inputs.loss_mask.sum())
    whole = gradient(policy_loss, inputs, num_loss_tokens).split(LENGTHS)
    streams = [part.split(LENGTHS) for part in (inputs.logprobs, inputs.old_logprobs, inputs.advantages)]
    masks = inputs.loss_mask.split(LENGTHS)
    for order in itertools.permutations(range(len(LENGTHS))):
        for members in (order[:1], order[1:]):
            part = LossInputs(
                *(torch.cat([stream[index] for index in members]) for stream in streams),
                loss_mask=torch.cat([masks[index] for index in members]),
                lengths=tuple(LENGTHS[index] for index in members),
            )
            expected = torch.cat([whole[index] for index in members])
            torch.testing.assert_close(gradient(policy_loss, part, num_loss_tokens), expected)


def test_masked_tokens_do_not_matter(policy_loss: PolicyLoss) -> None:
    inputs = some_inputs()
    noise = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    disturbed = replace(inputs, old_logprobs=torch.where(inputs.loss_mask, inputs.old_logprobs, noise))
    torch.testing.assert_close(gradient(policy_loss, disturbed, 10), gradient(policy_loss, inputs, 10))


def test_no_advantage_means_no_gradient(policy_loss: PolicyLoss) -> None:
    inputs = some_inputs()
    indifferent = replace(inputs, advantages=torch.zeros_like(inputs.advantages))
    assert (gradient(policy_loss, indifferent, 10) == 0).all()


def test_old_numbers_and_advantages_are_not_learned(policy_loss: PolicyLoss) -> None:
    inputs = some_inputs()
    watched = replace(
        inputs,
        logprobs=inputs.logprobs.clone().requires_grad_(),
        old_logprobs=inputs.old_logprobs.clone().requires_grad_(),
    )
    policy_loss(watched, CLIP).sum().backward()
    assert watched.logprobs.grad is not None
