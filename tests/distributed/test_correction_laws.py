"""The importance weights on a sharded model: the same numbers and gradients however the batch is cut and run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cases
import gradients
import numpy as np
import pytest
from cases import Setup
from gang import GangOf
from gradients import Cuts, relative_differences
from numpy.typing import NDArray

from chatlearn.algorithm.correction import Correction
from chatlearn.records import Sample

RELATIVE = 1e-5

CORRECTIONS: Cuts = {
    "token truncate": {"correction": Correction(token="truncate", token_high=2.0)},
    "sequence truncate, gspo": {"correction": Correction(sequence="truncate", sequence_high=2.0), "loss": "gspo"},
    "both mask": {"correction": Correction("mask", 0.5, 5.0, "mask", 0.9, 1.1)},
}
# Log-ratios of tokens: inside all bounds, and beyond each. Every sequence has the mean of its row; two means are
# within the bounds for geometric means. None is near a bound, where rounding could decide.
TOKEN_GAPS = (0.3, -0.3, 1.2, -1.2, 2.2, -2.2)
SEQUENCE_GAPS = (0.0, 0.4, -0.4, 0.02)


@pytest.fixture(scope="module")
def batches(gang_of: GangOf, models: dict[str, Path]) -> dict[str, list[Sample]]:
    """Answers that the engine found likelier or less likely than the trainer does; with and without old logprobs."""
    samples = cases.random_samples(8, seed=3)
    scores = gang_of(1).run(cases.score, Setup(models["tied"]), samples, True)[0]
    remembered = gradients.near_policy(samples, scores)
    return {
        "old logprobs": with_gaps(remembered, [sample.old_logprobs for sample in remembered]),
        "none": [replace(sample, old_logprobs=None) for sample in with_gaps(remembered, scores)],
    }


def with_gaps(samples: Sequence[Sample], old: Sequence[NDArray[np.float32]]) -> list[Sample]:
    changed = []
    for number, (sample, logprobs) in enumerate(zip(samples, old, strict=True)):
        gaps = np.resize(TOKEN_GAPS, int(sample.loss_mask.sum()))
        away = np.zeros(len(logprobs))
        away[sample.loss_mask] = gaps - gaps.mean() + SEQUENCE_GAPS[number % len(SEQUENCE_GAPS)]
        rollout = np.where(sample.loss_mask, logprobs - away, 0).astype(np.float32)
        changed.append(replace(sample, rollout_logprobs=rollout))
    return changed


@pytest.mark.parametrize("old", ["old logprobs", "none"])
def test_weighted_gradient_does_not_depend_on_how_it_is_run(
    gang_of: GangOf, models: dict[str, Path], batches: dict[str, list[Sample]], old: str
) -> None:
    setup = Setup(models["tied"], kl_coef=0.1, entropy_coef=0.01)
    plain: Cuts = {"plain": {}}
    expected = gang_of(1).run(gradients.outcomes, setup, batches[old], plain | CORRECTIONS)[0]
    for name in CORRECTIONS:
        assert max(relative_differences(expected[name], expected["plain"]).values()) > 0.1, "the weights must matter"
    assert 0.2 < expected["both mask"].numbers["correction_masked_ratio"] < 0.9
    variants = ((1, {"max_tokens": 64}), (2, {"packing": False}), (2, {"sequence_parallel_size": 2}))
    for num_ranks, changes in variants:
        found = gang_of(num_ranks).run(gradients.outcomes, replace(setup, **changes), batches[old], CORRECTIONS)[0]
        for name in CORRECTIONS:
            differences = relative_differences(found[name], expected[name])
            assert max(differences.values()) <= RELATIVE, (name, changes, differences)


def test_statistics_describe_the_weights_of_all_ranks(
    gang_of: GangOf, models: dict[str, Path], batches: dict[str, list[Sample]]
) -> None:
    samples = batches["old logprobs"]
    log_ratio = np.concatenate([(s.old_logprobs - s.rollout_logprobs)[s.loss_mask] for s in samples])
    ratio = np.exp(log_ratio)
    weights = np.where((ratio >= 0.5) & (ratio <= 5.0), ratio, 0)
    correction = Correction(token="mask", token_low=0.5, token_high=5.0)
    setup = Setup(models["tied"], correction=correction, num_steps=1)
    for (stats,), _ in gang_of(2).run(cases.train, setup, samples):
        assert stats.correction_weight_mean == pytest.approx(weights.mean(), rel=RELATIVE)
        assert stats.correction_masked_ratio == pytest.approx((weights == 0).mean(), rel=RELATIVE)
        effective = weights.sum() ** 2 / np.square(weights).sum() / len(weights)
        assert stats.correction_ess == pytest.approx(effective, rel=RELATIVE)
    (plain,), _ = gang_of(2).run(cases.train, replace(setup, correction=None), samples)[0]
    assert (plain.correction_ess, plain.correction_masked_ratio, plain.correction_weight_mean) == (None, None, None)
