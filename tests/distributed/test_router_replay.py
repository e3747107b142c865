"""A trainer that takes the engine's experts: the same numbers however it runs, and a router that still learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import Setup, mine, my_share, scores_of
from gang import GangOf
from gradients import Outcome, relative_differences

from chatlearn.models.family import family_of
from chatlearn.models.router_replay import RouteRecorder, share_agreeing
from chatlearn.records import Sample
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.sharded_model import ShardedModel

RELATIVE = 1e-5
NUM_EXPERTS = 5
ROUTERS = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)]

# How the batch is cut, over how many ranks.
VARIANTS: dict[str, tuple[int, dict[str, object]]] = {
    "small bins": (1, {"max_tokens": 64}),
    "micro-batches of three on two ranks": (2, {"packing": False, "micro_batch_size": 3}),
    "grouped experts": (2, {"grouped_experts": True, "max_tokens": 64}),
    "slices of sequences": (2, {"sequence_parallel_size": 2, "max_tokens": 64}),
    "slices of sequences, grouped": (2, {"sequence_parallel_size": 2, "grouped_experts": True}),
    "no checkpointing": (2, {"checkpointing": "off", "meta_init": True}),
    "selective checkpointing": (2, {"checkpointing": "selective", "whole_below_bytes": 0}),
}


@dataclass(frozen=True)
class RoutedSetup(Setup):
    """A setup that may replay."""

    router_replay: bool = True

    def spec(self) -> ModelSpec:
        return replace(super().spec(), router_replay=self.router_replay)


@dataclass(frozen=True)
class Found:
    """What a forward and backward give, and how the routers agreed with the routes."""

    outcome: Outcome
    agreement: float | None


def train(setup: RoutedSetup, batches: Mapping[str, list[Sample]]) -> dict[str, Found]:
    """Load once, and find the gradient of every batch."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    return {name: found(model, setup, samples) for name, samples in batches.items()}


def found(model: ShardedModel, setup: RoutedSetup, samples: list[Sample]) -> Found:
    trainer = PolicyTrainer(model, setup.optimizer(), setup.objective())
    batch = mine(setup, samples)
    sums = trainer.accumulate(my_share(setup, batch), batch.num_loss_tokens)
    numbers = {name: float(value) for name, value in vars(sums.parts).items()}
    gradients = {name: gradient.numpy().copy() for name, gradient in trainer.gradients()}
    trainer.optimizer.zero_grad()
    return Found(Outcome(numbers, gradients if dist.get_rank() == 0 else {}), share_agreeing(sums.routing))


def divergence_from_itself(setup: RoutedSetup, samples: list[Sample]) -> tuple[float, float]:
    """The KL between a model and itself, and the clip fraction, when old and reference scores are its own."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    scores = scores_of(model, setup, samples)
    on_policy = [replace(s, old_logprobs=o, ref_logprobs=o) for s, o in zip(samples, scores, strict=True)]
    numbers = found(model, setup, on_policy).outcome.numbers
    return numbers["kl_loss"], numbers["clip_fraction"]


def setup_of(path: Path, **changes: object) -> RoutedSetup:
    return replace(RoutedSetup(path, kl_coef=0.1, entropy_coef=0.01), **changes)


def difference(left: Found, right: Found) -> float:
    return max(relative_differences(left.outcome, right.outcome).values())


@pytest.fixture(scope="module")
def free() -> list[Sample]:
    return cases.random_samples(12, with_old=True, with_ref=True)


@pytest.fixture(scope="module")
def own(models: dict[str, Path], free: list[Sample]) -> list[Sample]:
    """The samples with the routes of a plain transformers forward; the last token never went into an engine."""
    model, experts = cases.transformers_model(models["moe"]), family_of(models["moe"]).experts
    assert experts is not None
    recorder = RouteRecorder(model, experts)
    routed = []
    with torch.no_grad():
        for sample in free:
            model(input_ids=torch.from_numpy(sample.token_ids[:-1]).long()[None])
            routed.append(replace(sample, routed_experts=recorder.latest(1)[0]))
    return routed


@pytest.fixture(scope="module")
def moved(own: list[Sample]) -> list[Sample]:
    """The samples with routes that have about one expert in common with the router's own."""
    generator = np.random.default_rng(4)
    shifts = [generator.integers(0, NUM_EXPERTS, (*s.routed_experts.shape[:2], 1)) for s in own]
    return [
        replace(s, routed_experts=((s.routed_experts + shift) % NUM_EXPERTS).astype(np.uint8))
        for s, shift in zip(own, shifts, strict=True)
    ]


def test_replaying_the_routers_own_choice_changes_nothing(
    gang_of: GangOf, models: dict[str, Path], free: list[Sample], own: list[Sample]
) -> None:
    (results,) = gang_of(1).run(train, setup_of(models["moe"]), {"free": free, "own": own})
    assert difference(results["own"], results["free"]) < 1e-7
    assert results["own"].agreement == 1.0
    assert results["free"].agreement is None


def test_replaying_another_choice_changes_the_loss_and_still_trains_the_router(
    gang_of: GangOf, models: dict[str, Path], free: list[Sample], moved: list[Sample]
) -> None:
    (results,) = gang_of(1).run(train, setup_of(models["moe"]), {"free": free, "moved": moved})
    expected, replayed = results["free"].outcome, results["moved"].outcome
    assert abs(replayed.numbers["pg_loss"] / expected.numbers["pg_loss"] - 1) > 1e-3
    for name in ROUTERS:
        assert np.linalg.norm(replayed.gradients[name]) > 0.1 * np.linalg.norm(expected.gradients[name]) > 0
    assert results["moved"].agreement < 0.9


def test_without_replay_routes_are_only_compared(
    gang_of: GangOf, models: dict[str, Path], free: list[Sample], own: list[Sample], moved: list[Sample]
) -> None:
    setup = setup_of(models["moe"], router_replay=False)
    (results,) = gang_of(1).run(train, setup, {"free": free, "own": own, "moved": moved})
    assert difference(results["moved"], results["free"]) == difference(results["own"], results["free"]) == 0.0
    assert results["own"].agreement == 1.0
    # A guess at position i is routed at position i, and trained if token i + 1 is.
    common = [
        len(set(chosen.tolist()) & set(given.tolist()))
        for mine_, theirs in zip(own, moved, strict=True)
        for position in np.flatnonzero(mine_.loss_mask[1:])
        for chosen, given in zip(mine_.routed_experts[position], theirs.routed_experts[position], strict=True)
    ]
    assert results["moved"].agreement == pytest.approx(sum(common) / (2 * len(common)), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_does_not_depend_on_layout(
    gang_of: GangOf, models: dict[str, Path], baseline: Found, moved: list[Sample], variant: str
) -> None:
    num_ranks, changes = VARIANTS[variant]
    first, *others = gang_of(num_ranks).run(train, setup_of(models["moe"], **changes), {"moved": moved})
    assert difference(first["moved"], baseline) < RELATIVE
    assert first["moved"].agreement == pytest.approx(baseline.agreement, rel=1e-12)
    assert all(other["moved"].agreement == first["moved"].agreement for other in others)


@pytest.fixture(scope="module")
def baseline(gang_of: GangOf, models: dict[str, Path], moved: list[Sample]) -> Found:
    """One rank, everything in one micro-batch, computed once."""
    (results,) = gang_of(1).run(train, setup_of(models["moe"]), {"moved": moved})
    return results["moved"]


def test_a_replaying_model_is_its_own_reference(gang_of: GangOf, models: dict[str, Path], moved: list[Sample]) -> None:
    """Scores replay as steps do: between equal weights there is no KL, and no ratio but one."""
    ((kl_loss, clip_fraction),) = gang_of(1).run(divergence_from_itself, setup_of(models["moe"]), moved)
    assert kl_loss == pytest.approx(0.0, abs=1e-9)
    assert clip_fraction == 0.0


def test_more_ranks_than_samples_with_routes(gang_of: GangOf, models: dict[str, Path], moved: list[Sample]) -> None:
    """A filler has no routes, and is not compared."""
    (alone,) = gang_of(1).run(train, setup_of(models["moe"]), {"one": moved[:1]})
    first, _ = gang_of(2).run(train, setup_of(models["moe"]), {"one": moved[:1]})
    assert difference(first["one"], alone["one"]) < RELATIVE
    assert first["one"].agreement == alone["one"].agreement
