"""The chunked log-probabilities agree with plain torch, in value, in gradient, in every chunk size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chatlearn.algorithm.logprob import token_logprobs_and_entropy

T, H, V = 13, 8, 37


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (T,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    distribution = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    return distribution.gather(-1, labels[:, None]).squeeze(-1), -(distribution.exp() * distribution).sum(-1)


@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_log_softmax(chunk_rows: int, temperature: float) -> None:
    hidden, weight, labels = inputs(torch.float64)
    pull = torch.linspace(-1, 1, T, dtype=torch.float64)
    expected = plain(hidden, weight, labels, temperature)
    expected_grads = torch.autograd.grad((expected[0] * pull + expected[1] * pull.flip(0)).sum(), (hidden, weight))
    actual = token_logprobs_and_entropy(hidden, weight, labels, temperature, chunk_rows)
    grads = torch.autograd.grad((actual[0] * pull + actual[1] * pull.flip(0)).sum(), (hidden, weight))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("output", [0, 1])
def test_finite_differences_agree(output: int) -> None:
    hidden, weight, labels = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs_and_entropy(h, w, labels, 0.7, chunk_rows=4)[output], (hidden, weight)
    )


def test_it_is_the_linear_cross_entropy_of_torch() -> None:
    hidden, weight, labels = inputs(torch.float32)
    logprobs, _ = token_logprobs_and_entropy(hidden, weight, labels)
    torch.testing.assert_close(-logprobs, F.linear_cross_entropy(hidden, weight, labels, reduction="none"))
    torch.testing.assert_close(-logprobs, F.cross_entropy(hidden @ weight.T, labels, reduction="none"))


def test_half_precision_inputs_are_not_rounded_on_the_way() -> None:
    """bfloat16 logits would be wrong by 1 part in 256; here only the inputs are rounded, as they came."""
    hidden, weight, labels = inputs(torch.bfloat16)
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, labels, chunk_rows=5)
    expected = plain(hidden.double(), weight.double(), labels, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close((logprobs.double(), entropy.double()), expected, rtol=1e-6, atol=1e-6)
    expected_grads = torch.autograd.grad(expected[0].sum(), (hidden, weight))
    grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(grads, expected_grads, rtol=2e-2, atol=2e-2)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -2e4]))
    torch.testing.assert_close(entropy, torch.zeros(2))
    assert torch.isfinite(grad).all()


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    hidden, weight, labels = inputs(torch.float64)
    frozen = weight.detach()
    logprobs, _ = token_logprobs_and_entropy(hidden, frozen, labels)
    logprobs.sum().backward()
    assert frozen.grad is None
    expected = torch.autograd.grad(plain(hidden, frozen, labels, 1.0)[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)


def test_no_tensor_of_all_positions_and_all_tokens_is_saved() -> None:
    hidden, weight, labels = inputs(torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: (saved.append(kept.numel()), kept)[1], lambda kept: kept
    ):
        token_logprobs_and_entropy(hidden, weight, labels, chunk_rows=4)
    assert saved
    assert max(saved) == V * H < T * V
