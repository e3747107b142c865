"""What must not change a training step: ranks, packing, micro-batches, initialisation, sharding, checkpointing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cases
import numpy as np
import pytest
from cases import Setup
from conftest import GangOf

from chatlearn.records import Sample

# float32 sums in another order differ by some 1e-7 of their size.
RELATIVE = 1e-5
WEIGHTS = 1e-5

# What is varied, over how many ranks.
VARIANTS: dict[str, tuple[int, dict[str, object]]] = {
    "two ranks": (2, {}),
    "small bins": (2, {"max_tokens": 64}),
    "a bin for each sample": (1, {"max_tokens": 1}),
    "micro-batches of three": (2, {"packing": False, "micro_batch_size": 3}),
    "meta initialisation": (2, {"meta_init": True}),
    "no gradient checkpointing": (2, {"checkpointing": "off"}),
    "gathered anew for every use": (2, {"whole_below_bytes": 0, "max_tokens": 64}),
    "gathered anew, no checkpointing": (2, {"whole_below_bytes": 0, "checkpointing": "off"}),
    "two replicas of one shard": (2, {"fsdp_size": 1, "max_tokens": 64}),
    "two replicas of two shards": (4, {"fsdp_size": 2, "max_tokens": 64, "meta_init": True}),
}


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return cases.random_samples(12, with_old=True, with_ref=True)


@pytest.fixture(scope="session")
def baselines() -> dict[Setup, object]:
    """Results of one rank with everything in one micro-batch, computed once for each model and loss."""
    return {}


def assert_same_training(
    gang_of: GangOf, baselines: dict[Setup, object], setup: Setup, variant: str, samples: list[Sample]
) -> None:
    num_ranks, changes = VARIANTS[variant]
    if setup not in baselines:
        baselines[setup] = gang_of(1).run(cases.train, setup, samples)[0]
    expected_stats, expected_weights = baselines[setup]
    results = gang_of(num_ranks).run(cases.train, replace(setup, **changes), samples)
    for stats, weights in results:
        assert stats == results[0][0], "every rank must report the same numbers"
        for got, expected in zip(stats, expected_stats, strict=True):
            for name, value in vars(expected).items():
                assert vars(got)[name] == pytest.approx(value, rel=RELATIVE, abs=1e-7), name
        assert cases.worst_difference(weights, expected_weights) < WEIGHTS


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["tied", "moe"])
def test_step_does_not_depend_on_layout(
    gang_of: GangOf,
    models: dict[str, Path],
    baselines: dict[Setup, object],
    samples: list[Sample],
    model: str,
    variant: str,
) -> None:
    setup = Setup(models[model], kl_coef=0.1, entropy_coef=0.01)
    assert_same_training(gang_of, baselines, setup, variant, samples)


@pytest.mark.parametrize("variant", ["micro-batches of three", "gathered anew for every use"])
def test_sequence_level_loss_does_not_depend_on_layout(
    gang_of: GangOf, models: dict[str, Path], baselines: dict[Setup, object], samples: list[Sample], variant: str
) -> None:
    assert_same_training(gang_of, baselines, Setup(models["untied"], loss="gspo"), variant, samples)


def test_grouped_experts_are_the_same_experts(gang_of: GangOf, models: dict[str, Path], samples: list[Sample]) -> None:
    setup = Setup(models["moe"])
    (one, one_weights), _ = gang_of(2).run(cases.train, setup, samples)
    (other, other_weights), _ = gang_of(2).run(cases.train, replace(setup, grouped_experts=True), samples)
    assert [stats.loss for stats in other] == pytest.approx([stats.loss for stats in one], rel=RELATIVE)
    assert [stats.grad_norm for stats in other] == pytest.approx([stats.grad_norm for stats in one], rel=RELATIVE)
    assert cases.worst_difference(one_weights, other_weights) < WEIGHTS


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("model", ["tied", "untied", "moe"])
def test_step_equals_plain_torch(gang_of: GangOf, models: dict[str, Path], model: str, with_old: bool) -> None:
    samples = cases.random_samples(8, seed=3, with_old=with_old, with_ref=with_old)
    setup = Setup(models[model], kl_coef=0.2, entropy_coef=0.05, clip_grad=0.5)
    losses, norms, weights = gang_of(1).run(cases.reference_training, setup, samples)[0]
    assert min(norms) > setup.clip_grad, "the test is to clip"
    for stats, trained in gang_of(2).run(cases.train, replace(setup, max_tokens=64), samples):
        assert [s.loss for s in stats] == pytest.approx(losses, rel=RELATIVE)
        assert [s.grad_norm for s in stats] == pytest.approx(norms, rel=RELATIVE)
        assert cases.worst_difference(trained, weights) < WEIGHTS


def test_training_moves_the_weights(gang_of: GangOf, models: dict[str, Path], samples: list[Sample]) -> None:
    """The other laws would hold for a trainer that does nothing."""
    setup = Setup(models["tied"])
    (stats, weights), _ = gang_of(2).run(cases.train, setup, samples)
    (before, _), _ = gang_of(2).run(cases.export_untouched, setup)
    assert all(np.abs(weights[name] - before[name]).max() > setup.lr / 10 for name in before)
    assert stats[0].grad_norm != stats[-1].grad_norm


def test_more_ranks_than_samples(gang_of: GangOf, models: dict[str, Path]) -> None:
    """A rank without a sample computes a filler, which changes nothing."""
    setup, one = Setup(models["moe"]), cases.random_samples(1, seed=5)
    expected_stats, expected_weights = gang_of(1).run(cases.train, setup, one)[0]
    for stats, weights in gang_of(2).run(cases.train, setup, one):
        assert stats[0].num_tokens == expected_stats[0].num_tokens
        assert stats[0].grad_norm == pytest.approx(expected_stats[0].grad_norm, rel=RELATIVE)
        assert cases.worst_difference(weights, expected_weights) < WEIGHTS


def test_infinite_gradient_leaves_weights_alone(
    gang_of: GangOf, models: dict[str, Path], samples: list[Sample]
) -> None:
    results = gang_of(2).run(cases.step_on_poison, Setup(models["tied"]), samples)
    for before, after, poisoned, healthy in results:
        assert not np.isfinite(poisoned.grad_norm)
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert np.isfinite(healthy.grad_norm)
        assert healthy == results[0][3]


def test_statistics_describe_the_batch(gang_of: GangOf, models: dict[str, Path]) -> None:
    samples = cases.random_samples(6, seed=9)
    expected = gang_of(1).run(cases.transformers_scores, models["tied"], samples, 1.3)[0]
    mask = np.concatenate([sample.loss_mask for sample in samples])
    trainer = np.concatenate(expected)[mask]
    engine = np.concatenate([sample.rollout_logprobs for sample in samples])[mask]
    log_ratio = trainer - engine
    stats = gang_of(2).run(cases.train, Setup(models["tied"], num_steps=1), samples)[0][0][0]
    assert stats.num_tokens == sum(len(sample.token_ids) for sample in samples)
    assert stats.num_loss_tokens == mask.sum()
    assert stats.rollout_logprob_diff_mean == pytest.approx(np.abs(log_ratio).mean(), rel=1e-4)
    assert stats.rollout_logprob_diff_max == pytest.approx(np.abs(log_ratio).max(), rel=1e-4)
    assert stats.rollout_kl == pytest.approx((np.exp(log_ratio) - log_ratio - 1).clip(max=10).mean(), rel=1e-4)
    assert stats.clip_fraction == 0.0, "the current policy is the old one"
