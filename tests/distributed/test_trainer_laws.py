"""What must not change a gradient: ranks, packing, micro-batches, initialisation, sharding, checkpointing, experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cases
import gradients
import numpy as np
import pytest
from cases import Setup
from gang import GangOf
from gradients import Cuts, Outcome, relative_differences

from chatlearn.models.family import FAMILIES, family_of
from chatlearn.records import Sample

# float32 sums in another order differ by some 1e-7 of their size; the largest difference seen is 1.3e-6.
RELATIVE = 1e-5
WEIGHTS = 1e-5

# What a sample has of each token.
STREAMS = ("token_ids", "loss_mask", "rollout_logprobs", "advantages", "old_logprobs", "ref_logprobs")

# How a batch may be cut on one and the same model. The baseline is one row, for each loss.
BASELINES: Cuts = {"grpo": {}, "gspo": {"loss": "gspo"}}
CUTS: Cuts = {
    "grpo, small bins": {"max_tokens": 64},
    "gspo, micro-batches of four": {"loss": "gspo", "packing": False, "micro_batch_size": 4},
}
MORE_CUTS: Cuts = CUTS | {
    "grpo, a bin for each sample": {"max_tokens": 1},
    "gspo, small bins": {"loss": "gspo", "max_tokens": 64},
    "grpo, micro-batches of three": {"packing": False, "micro_batch_size": 3},
}

# What else is varied, over how many ranks. Grouped experts change nothing where there are none.
VARIANTS: dict[str, tuple[int, dict[str, object]]] = {
    "two ranks": (2, {}),
    "meta initialisation, grouped experts": (2, {"meta_init": True, "grouped_experts": True}),
    "no gradient checkpointing": (2, {"checkpointing": "off"}),
    "selective gradient checkpointing": (2, {"checkpointing": "selective"}),
    "gathered anew for every use": (2, {"whole_below_bytes": 0}),
    "two replicas of one shard, gathered anew": (
        2,
        {"fsdp_size": 1, "whole_below_bytes": 0, "checkpointing": "off"},
    ),
    "two ranks a sequence": (2, {"sequence_parallel_size": 2}),
    "two ranks a sequence, selective, grouped, gathered anew": (
        2,
        {"sequence_parallel_size": 2, "checkpointing": "selective", "grouped_experts": True, "whole_below_bytes": 0},
    ),
    "two ranks a sequence, no checkpointing, two replicas": (
        2,
        {"sequence_parallel_size": 2, "checkpointing": "off", "fsdp_size": 1},
    ),
    "four ranks": (4, {}),
    "two replicas of two shards, gathered anew": (4, {"fsdp_size": 2, "whole_below_bytes": 0}),
    "four ranks a sequence": (4, {"sequence_parallel_size": 4}),
    "two ranks a sequence, two replicas of two shards": (
        4,
        {"sequence_parallel_size": 2, "fsdp_size": 2, "meta_init": True},
    ),
}

# For each fault a variant whose gradient it must spoil.
SPOILT: dict[str, str] = {
    "attention to the neighbour": "two ranks",
    "replicas that do not add up": "two replicas of one shard, gathered anew",
    "a gather that sums over the group": "two ranks a sequence",
    "an exchange that keeps its own": "two ranks a sequence",
    "gradients that stay where they arrive": "two ranks a sequence",
    "every rank counts": "two ranks a sequence",
    "key heads in another order": "four ranks a sequence",
}


class Bench:
    """Batches near each model's own policy, and the gradients of one rank with everything in one row, each once."""

    def __init__(self, gang_of: GangOf, models: dict[str, Path]) -> None:
        self.gang_of = gang_of
        self.setups = {name: Setup(path, kl_coef=0.1, entropy_coef=0.01) for name, path in models.items()}
        self.batches: dict[str, list[Sample]] = {}
        self.baselines: dict[str, dict[str, Outcome]] = {}

    def samples(self, model: str) -> list[Sample]:
        """Eight samples of 6 to 28 tokens."""
        if model not in self.batches:
            samples = cases.random_samples(8, seed=3)
            scores = self.gang_of(1).run(cases.score, self.setups[model], samples, True)[0]
            self.batches[model] = gradients.near_policy(samples, scores)
        return self.batches[model]

    def baseline(self, model: str, loss: str) -> Outcome:
        if model not in self.baselines:
            arguments = (gradients.outcomes, self.setups[model], self.samples(model), BASELINES)
            self.baselines[model] = self.gang_of(1).run(*arguments)[0]
        return self.baselines[model][loss]

    def worst(self, model: str, variant: str, cuts: Cuts, fault: str = "none") -> dict[str, tuple[float, str]]:
        """The largest relative difference of each cut from the baseline, and where it is."""
        num_ranks, changes = VARIANTS[variant]
        setup = replace(self.setups[model], **changes)
        results = self.gang_of(num_ranks).run(gradients.outcomes, setup, self.samples(model), cuts, fault)
        worst = {}
        for cut, outcome in results[0].items():
            assert all(result[cut].numbers == outcome.numbers for result in results), "ranks must report the same"
            expected = self.baseline(model, cut.split(",")[0])
            worst[cut] = max((value, name) for name, value in relative_differences(outcome, expected).items())
        return worst


@pytest.fixture(scope="module")
def bench(gang_of: GangOf, models: dict[str, Path]) -> Bench:
    return Bench(gang_of, models)


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return cases.random_samples(12, with_old=True, with_ref=True)


@pytest.mark.parametrize("model", ["tied", "moe"])
def test_batches_are_clipped_far_from_the_edges(bench: Bench, model: str) -> None:
    """Otherwise rounding could decide what is clipped, or nothing would be, and the laws below would say less."""
    setup = bench.setups[model]
    clip = setup.objective().clip
    edges = np.log([1 - clip.low, 1 + clip.high, clip.dual])
    scores = bench.gang_of(1).run(cases.score, setup, bench.samples(model), True)[0]
    for sample, score in zip(bench.samples(model), scores, strict=True):
        log_ratio = (score - sample.old_logprobs)[sample.loss_mask]
        assert np.abs(log_ratio[:, None] - edges).min() > 0.1
        assert np.abs(log_ratio.mean() - edges).min() > 0.1
        assert np.abs(sample.advantages[sample.loss_mask]).min() > 0.1
    for loss in BASELINES:
        assert 0.1 < bench.baseline(model, loss).numbers["clip_fraction"] < 0.5
    assert sum(len(sample.token_ids) for sample in bench.samples(model)) % 4, "a row is to need padding"


@pytest.mark.parametrize("model", ["tied", "untied", "moe"])
def test_gradient_does_not_depend_on_packing(bench: Bench, model: str) -> None:
    setup, batch = bench.setups[model], bench.samples(model)
    for cut, outcome in bench.gang_of(1).run(gradients.outcomes, setup, batch, MORE_CUTS)[0].items():
        differences = relative_differences(outcome, bench.baseline(model, cut.split(",")[0]))
        assert max(differences.values()) <= RELATIVE, (cut, differences)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["tied", "moe"])
def test_gradient_does_not_depend_on_how_it_is_run(bench: Bench, model: str, variant: str) -> None:
    worst = bench.worst(model, variant, CUTS)
    assert max(worst.values())[0] <= RELATIVE, worst


@pytest.mark.parametrize(
    ("model", "variant"),
    [
        ("untied", "two ranks a sequence"),
        ("qwen2", "two ranks a sequence"),
        ("qwen2", "four ranks a sequence"),
        ("llama", "four ranks a sequence"),
    ],
)
def test_sequence_parallelism_suits_every_family(bench: Bench, model: str, variant: str) -> None:
    """With key heads that the ranks of a sequence divide, that they do not divide, and of which they outnumber."""
    worst = bench.worst(model, variant, CUTS)
    assert max(worst.values())[0] <= RELATIVE, worst


def test_laws_are_tried_on_all_families(models: dict[str, Path]) -> None:
    assert {family_of(path).architecture for path in models.values()} == set(FAMILIES)


@pytest.mark.parametrize("fault", SPOILT)
def test_laws_catch_planted_faults(bench: Bench, fault: str) -> None:
    cuts = {"grpo, small bins": CUTS["grpo, small bins"]}
    worst = bench.worst("tied", SPOILT[fault], cuts, fault)
    assert max(worst.values())[0] > 1000 * RELATIVE


def test_every_fault_is_tried() -> None:
    assert set(SPOILT) == set(gradients.FAULTS) - {"none"}


@pytest.mark.parametrize(
    ("model", "num_ranks", "sequence_parallel_size", "length"), [("tied", 4, 4, 3), ("moe", 4, 2, 5), ("moe", 2, 1, 6)]
)
def test_gradient_survives_fillers_and_rows_shorter_than_the_group(
    bench: Bench, model: str, num_ranks: int, sequence_parallel_size: int, length: int
) -> None:
    """One sample for all: other ranks compute a filler of one token, which changes nothing."""
    setup = bench.setups[model]
    sample = bench.samples(model)[0]
    one = [replace(sample, **{name: vars(sample)[name][-length:] for name in STREAMS})]
    expected = bench.gang_of(1).run(gradients.outcomes, setup, one, BASELINES)[0]
    shared = replace(setup, sequence_parallel_size=sequence_parallel_size)
    found = bench.gang_of(num_ranks).run(gradients.outcomes, shared, one, BASELINES)[0]
    for loss in BASELINES:
        differences = relative_differences(found[loss], expected[loss])
        assert max(differences.values()) <= RELATIVE, differences


@pytest.mark.parametrize(
    ("model", "variant"),
    [("tied", "two ranks a sequence, two replicas of two shards"), ("moe", "meta initialisation, grouped experts")],
)
def test_training_does_not_depend_on_how_it_is_run(
    bench: Bench, samples: list[Sample], model: str, variant: str
) -> None:
    """Several steps: a gradient that is not forgotten, or weights that a rank does not see, would show."""
    num_ranks, changes = VARIANTS[variant]
    setup = bench.setups[model]
    expected_stats, expected_weights = bench.gang_of(1).run(cases.train, setup, samples)[0]
    results = bench.gang_of(num_ranks).run(cases.train, replace(setup, **changes, max_tokens=64), samples)
    for stats, weights in results:
        assert stats == results[0][0], "every rank must report the same numbers"
        for got, expected in zip(stats, expected_stats, strict=True):
            measured = {name: value for name, value in vars(expected).items() if value is not None}
            for name, value in measured.items():
                assert vars(got)[name] == pytest.approx(value, rel=RELATIVE, abs=1e-7), name
        assert cases.worst_difference(weights, expected_weights) < WEIGHTS


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


@pytest.mark.parametrize(
    ("num_ranks", "changes"),
    [(1, {}), (1, {"whole_below_bytes": 0}), (2, {"fsdp_size": 1, "whole_below_bytes": 0})],
)
def test_half_precision_loses_nothing_between_micro_batches(
    gang_of: GangOf, models: dict[str, Path], num_ranks: int, changes: dict[str, object]
) -> None:
    """Thirty-two times the same sample in micro-batches of its own: as a power of two it changes no rounding but that
    of the sum, which bfloat16 would get wrong in its third digit."""
    setup = Setup(models["tied"], compute_dtype="bfloat16", max_tokens=1)
    one = cases.random_samples(1, seed=5)
    expected = gang_of(1).run(gradients.outcomes, setup, one, {"": {}})[0][""]
    found = gang_of(num_ranks).run(gradients.outcomes, replace(setup, **changes), one * 32, {"": {}})[0][""]
    differences = relative_differences(found, expected)
    assert max(differences[name] for name in expected.gradients) <= RELATIVE, differences


def test_replicas_add_up_once_a_step(gang_of: GangOf, models: dict[str, Path], samples: list[Sample]) -> None:
    """One sum for each of two blocks and for the rest, however many micro-batches there are."""
    setup = Setup(models["tied"], fsdp_size=1, whole_below_bytes=0, max_tokens=1)
    for num_micro_batches, num_sums in gang_of(2).run(gradients.sums_over_replicas, setup, samples):
        assert num_micro_batches == len(samples) / 2
        assert num_sums == 3


def test_training_moves_the_weights(gang_of: GangOf, models: dict[str, Path], samples: list[Sample]) -> None:
    """The other laws would hold for a trainer that does nothing."""
    setup = Setup(models["tied"])
    (stats, weights), _ = gang_of(2).run(cases.train, setup, samples)
    (before, _), _ = gang_of(2).run(cases.export_untouched, setup)
    assert all(np.abs(weights[name] - before[name]).max() > setup.lr / 10 for name in before)
    assert stats[0].grad_norm != stats[-1].grad_norm


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
