"""The processed distribution keeps what the plan says, against a second, slower way of saying it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatlearn.rollout.engine import SamplingPlan
from chatlearn.rollout.sampling import processed_logits

VOCABULARY = 12
EMPTY = torch.empty(0, dtype=torch.int64)


def logits_of(seed: int) -> Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), top_p=st.floats(0.05, 0.99), temperature=st.floats(0.3, 2.0))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(seed: int, top_p: float, temperature: float) -> None:
    logits = logits_of(seed)
    kept = processed_logits(logits, EMPTY, EMPTY, SamplingPlan(top_p=top_p, temperature=temperature)).isfinite()
    probabilities = (logits / temperature).softmax(-1)
    mass, smallest = float(probabilities[kept].sum()), float(probabilities[kept].min())
    assert mass >= top_p - 1e-5
    assert kept.sum() == 1 or mass - smallest < top_p + 1e-5
    assert (probabilities[~kept] <= smallest).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), top_k=st.integers(1, 20))
def test_top_k_keeps_the_k_likeliest(seed: int, top_k: int) -> None:
    logits = logits_of(seed)
    kept = processed_logits(logits, EMPTY, EMPTY, SamplingPlan(top_k=top_k)).isfinite()
    assert set(kept.nonzero().flatten().tolist()) == set(logits.argsort(descending=True)[:top_k].tolist())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), min_p=st.floats(0.01, 1.0))
def test_min_p_is_relative_to_the_likeliest(seed: int, min_p: float) -> None:
    logits = logits_of(seed)
    kept = processed_logits(logits, EMPTY, EMPTY, SamplingPlan(min_p=min_p)).isfinite()
    gaps = logits.max() - logits
    assert torch.equal(kept, gaps <= -math.log(min_p)) or (gaps + math.log(min_p)).abs().min() < 1e-5


def test_penalties_count_what_they_are_named_for() -> None:
    logits = torch.tensor([1.0, -1.0, 1.0, 1.0])
    prompt, generated = torch.tensor([0, 1]), torch.tensor([2, 2])
    plan = SamplingPlan(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    expected = [0.5, -2.0, 0.5 - 2 * 0.25 - 0.5, 1.0]
    assert processed_logits(logits, prompt, generated, plan).tolist() == pytest.approx(expected)


def test_a_plain_plan_changes_nothing() -> None:
    logits = logits_of(0)
    assert torch.equal(processed_logits(logits, EMPTY, EMPTY, SamplingPlan()), logits)
    assert torch.equal(processed_logits(logits, EMPTY, EMPTY, SamplingPlan(temperature=0.0)), logits)
