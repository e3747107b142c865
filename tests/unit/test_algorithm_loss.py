"""The losses against a naive reference, one token at a time in plain Python, and the laws that must survive edits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.algorithm.aggregate import token_mean
from chatlearn.algorithm.kl import k1, k2, k3
from chatlearn.algorithm.loss import ClipRange, LossInputs, clip_fraction, clipped_surrogate, sequence_surrogate

CLIP = ClipRange(low=0.2, high=0.28, max_log_ratio=10.0, dual=3.0)
laws = settings(max_examples=80, deadline=None, derandomize=True)

# (new logprob, old logprob, advantage, is it trained) of one token, and the tokens of some sequences
TOKENS = st.tuples(st.floats(-8, 0), st.floats(-8, 0), st.floats(-6, 6), st.booleans())
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=5)
Token = tuple[float, float, float, bool]


def inputs_of(sequences: Sequence[Sequence[Token]]) -> LossInputs:
    tokens = [token for sequence in sequences for token in sequence]
    new, old, advantages, mask = zip(*tokens, strict=True)
    return LossInputs(
        logprobs=torch.tensor(new, dtype=torch.float64, requires_grad=True),
        old_logprobs=torch.tensor(old, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        loss_mask=torch.tensor(mask),
        lengths=tuple(len(sequence) for sequence in sequences),
    )


def token_loss(log_ratio: float, advantage: float, clip: ClipRange) -> float:
    ratio = math.exp(min(log_ratio, clip.max_log_ratio))
    clipped = min(max(ratio, 1 - clip.low), 1 + clip.high)
    if advantage >= 0:
        return -min(advantage * ratio, advantage * clipped)
    return -max(min(advantage * ratio, advantage * clipped), advantage * clip.dual)


@laws
@given(SEQUENCES)
def test_clipped_surrogate_is_the_formula_token_by_token(sequences: list[list[Token]]) -> None:
    inputs = inputs_of(sequences)
    loss = clipped_surrogate(inputs, CLIP)
    tokens = [token for sequence in sequences for token in sequence]
    for value, (new, old, advantage, trained) in zip(loss.tolist(), tokens, strict=True):
        if trained:
            assert value == pytest.approx(token_loss(new - old, advantage, CLIP), rel=1e-9, abs=1e-12)


@laws
@given(SEQUENCES)
def test_sequence_surrogate_uses_the_mean_over_the_sequence(sequences: list[list[Token]]) -> None:
    loss = iter(sequence_surrogate(inputs_of(sequences), CLIP).tolist())
    for sequence in sequences:
        trained = [new - old for new, old, _, is_trained in sequence if is_trained]
        mean = sum(trained) / max(len(trained), 1)
        for (_, _, advantage, is_trained), value in zip(sequence, loss, strict=False):
            if is_trained:
                assert value == pytest.approx(token_loss(mean, advantage, CLIP), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("advantage", [-5.57, -3.11, -1.0, 0.5, 5.57])
@pytest.mark.parametrize("loss", [clipped_surrogate, sequence_surrogate])
def test_on_policy_samples_keep_their_gradient_however_bad_they_were(loss, advantage: float) -> None:
    """The original clipped the loss at 3 instead of the ratio: one wrong answer of 32 (A = -5.57) taught nothing."""
    inputs = inputs_of([[(-1.0, -1.0, advantage, True)]])
    loss(inputs, CLIP).sum().backward()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.item() == pytest.approx(-advantage)


def test_dual_clip_bounds_the_ratio_of_bad_tokens_only() -> None:
    far = math.log(5.0)
    inputs = inputs_of([[(far - 6, -6.0, -2.0, True), (far - 6, -6.0, 2.0, True)]])
    loss = clipped_surrogate(inputs, CLIP)
    assert loss.tolist() == pytest.approx([2.0 * CLIP.dual, -2.0 * (1 + CLIP.high)])
    loss.sum().backward()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.tolist() == [0.0, 0.0]


def test_a_bad_token_that_became_likelier_keeps_pulling_up_to_the_dual_bound() -> None:
    inputs = inputs_of([[(math.log(2.0) - 6, -6.0, -1.0, True)]])
    clipped_surrogate(inputs, CLIP).sum().backward()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.item() == pytest.approx(2.0)


def test_the_log_ratio_is_cut_against_overflow() -> None:
    endless = ClipRange(low=0.2, high=0.2, max_log_ratio=10.0, dual=math.inf)
    inputs = inputs_of([[(0.0, -2000.0, -1.0, True)]])
    loss = clipped_surrogate(inputs, endless)
    assert loss.item() == pytest.approx(math.exp(10.0))


def test_masked_tokens_never_produce_a_gradient_even_when_they_are_not_numbers() -> None:
    inputs = inputs_of([[(-1.0, -math.inf, 1.0, False), (-1.0, -1.5, 1.0, True)]])
    token_mean(clipped_surrogate(inputs, CLIP), inputs.loss_mask, 1).backward()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad[0] == 0.0
    assert torch.isfinite(inputs.logprobs.grad).all()


def test_clip_fraction_counts_tokens_that_clipping_silenced() -> None:
    sequence: list[Token] = [
        (math.log(2.0) - 6, -6.0, 1.0, True),  # above 1.28 with a good answer: clipped
        (math.log(0.5) - 6, -6.0, -1.0, True),  # below 0.8 with a bad one: clipped
        (math.log(0.5) - 6, -6.0, 1.0, True),  # below 0.8 with a good one: still pulled
        (-1.0, -1.0, 0.0, True),  # nothing to learn is not clipping
        (math.log(2.0) - 6, -6.0, 1.0, False),  # not trained
    ]
    inputs = inputs_of([sequence])
    assert clip_fraction(clipped_surrogate, inputs, CLIP, num_loss_tokens=4).item() == pytest.approx(0.5)
    with torch.no_grad():
        assert clip_fraction(clipped_surrogate, inputs, CLIP, num_loss_tokens=8).item() == pytest.approx(0.25)
    assert inputs.logprobs.grad is None


def test_kl_estimators_are_their_formulas() -> None:
    new = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)
    difference = [-0.5, 1.0, 0.0]
    assert k1(new, ref).tolist() == pytest.approx([-x for x in difference])
    assert k2(new, ref).tolist() == pytest.approx([x * x / 2 for x in difference])
    assert k3(new, ref).tolist() == pytest.approx([math.exp(x) - 1 - x for x in difference])
    assert k3(torch.tensor([-50.0]), torch.tensor([0.0])).item() == 10.0


def test_kl_estimators_agree_with_the_exact_divergence() -> None:
    """The expectation over the policy of k1 and k3 is KL(policy || reference) exactly, and of k2 nearly."""
    generator = torch.Generator().manual_seed(0)
    policy_logits = torch.randn(50, generator=generator, dtype=torch.float64)
    reference = torch.log_softmax(policy_logits + 0.05 * torch.randn(50, generator=generator, dtype=torch.float64), -1)
    policy = torch.log_softmax(policy_logits, -1)
    exact = (policy.exp() * (policy - reference)).sum().item()
    for estimator, tolerance in ((k1, 1e-9), (k3, 1e-9), (k2, 0.05)):
        assert (policy.exp() * estimator(policy, reference)).sum().item() == pytest.approx(exact, rel=tolerance)


def test_inputs_of_unequal_length_are_refused() -> None:
    stream = torch.zeros(3)
    with pytest.raises(AssertionError, match="shape"):
        LossInputs(stream, stream, stream, torch.zeros(3, dtype=torch.bool), lengths=(2,))


def test_k3_has_a_finite_gradient_where_the_reference_is_astronomically_likelier() -> None:
    logprobs = torch.tensor([-200.0, -1.0], requires_grad=True)
    k3(logprobs, torch.tensor([0.0, -2.0])).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
