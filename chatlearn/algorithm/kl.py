"""Estimators of KL(policy || reference) per token, from tokens that the policy sampled.

With ``x = log reference - log policy``: k1 is unbiased with high variance, k2 is biased with low variance, k3 is
unbiased and never negative (John Schulman, "Approximating KL Divergence", 2020). All are [T], in nats per token.
"""

from __future__ import annotations

from torch import Tensor

# One token on which the reference is e**10 times likelier than the policy would outweigh a whole batch.
MAX_KL = 10.0
MAX_EXPONENT = 20.0  # Far beyond MAX_KL, far below float32's overflow at 88.


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``-x``: unbiased, of either sign."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``x**2 / 2``: biased, but its gradient is the KL's where policy and reference are close."""
    return (ref_logprobs - logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``exp(x) - 1 - x``, at most ``MAX_KL``: unbiased, never negative."""
    difference = ref_logprobs - logprobs
    # Cut before the exponential too: its infinity would come back from the backward pass as NaN.
    return (difference.clamp(max=MAX_EXPONENT).expm1() - difference).clamp(max=MAX_KL)
