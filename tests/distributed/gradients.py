"""What the ranks of a gang do to find the gradient of one batch, cut in several ways; and faults to plant in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from cases import Setup, Weights, mine, my_share
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh

from chatlearn.models import ulysses
from chatlearn.models.attention import PackedLayout
from chatlearn.records import Sample
from chatlearn.trainer import build, sharded_model
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.parallel import SHARD_AXIS, ParallelPlan
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.sharded_model import ShardedModel

Cuts = Mapping[str, Mapping[str, object]]

# How far the policy has moved from the old one, as log-ratios of whole sequences: within the clip range, beyond either
# edge of it, and beyond the bound for negative advantages.
DRIFTS = (0.0, 0.6, 0.0, -0.6, 0.0, 1.4, 0.0, 0.0)
NOISE = 0.08


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward over a batch gives: the reported numbers, and every gradient by stored name."""

    numbers: dict[str, float]
    gradients: Weights


def outcomes(setup: Setup, samples: Sequence[Sample], cuts: Cuts, fault: str = "none") -> dict[str, Outcome]:
    """Load once, and find the gradient for every cut: changes of ``setup`` that need no other model.

    All ranks have the same result, so only the first one carries the gradients home.
    """
    with FAULTS[fault]():
        model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
        return {name: outcome(model, replace(setup, **changes), samples) for name, changes in cuts.items()}


def outcome(model: ShardedModel, setup: Setup, samples: Sequence[Sample]) -> Outcome:
    trainer = PolicyTrainer(model, setup.optimizer(), setup.objective())
    batch = mine(setup, samples)
    sums = trainer.accumulate(my_share(setup, batch), batch.num_loss_tokens)
    numbers = {name: float(value) for name, value in vars(sums.parts).items()}
    numbers |= {"num_tokens": float(sums.num_tokens), "largest": float(sums.largest_rollout_difference)}
    gradients = {name: gradient.numpy().copy() for name, gradient in trainer.gradients()}
    trainer.optimizer.zero_grad()
    return Outcome(numbers, gradients if dist.get_rank() == 0 else {})


def sums_over_replicas(setup: Setup, samples: Sequence[Sample]) -> tuple[int, int]:
    """How many micro-batches this rank has, and how often a step adds up gradients over replicas."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    trainer = PolicyTrainer(model, setup.optimizer(), setup.objective())
    batch = mine(setup, samples)
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        trainer.accumulate(my_share(setup, batch), batch.num_loss_tokens)
    # The trainer's own sums are over the group of all ranks, which it does not name.
    return len(my_share(setup, batch)), sum("group" in call.kwargs for call in all_reduce.call_args_list)


def relative_differences(found: Outcome, expected: Outcome) -> dict[str, float]:
    """How far each number and gradient is from what is expected.

    A gradient is compared as a whole: ``||dg|| / max(||g||, 1e-3 ||g_all||)``, where ``g_all`` is all of them.
    """
    assert found.gradients.keys() == expected.gradients.keys()
    whole = np.sqrt(sum(np.sum(np.square(gradient, dtype=np.float64)) for gradient in expected.gradients.values()))
    differences = {
        name: abs(found.numbers[name] - number) / max(abs(number), 1e-6) for name, number in expected.numbers.items()
    }
    for name, gradient in expected.gradients.items():
        distance = np.linalg.norm((found.gradients[name] - gradient).ravel().astype(np.float64))
        differences[name] = float(distance / max(np.linalg.norm(gradient.ravel()), 1e-3 * whole))
    return differences


def near_policy(samples: Sequence[Sample], scores: Sequence[NDArray[np.float32]]) -> list[Sample]:
    """The samples with old and reference log-probabilities near those of the policy, ``scores``.

    Log-ratios are the drift of the sequence and a little noise, so that no token and no sequence is near an edge where
    rounding could decide whether it is clipped.
    """
    generator = np.random.default_rng(11)
    moved = []
    for number, (sample, score) in enumerate(zip(samples, scores, strict=True)):
        log_ratio = DRIFTS[number % len(DRIFTS)] + generator.uniform(-NOISE, NOISE, len(score))
        gap = generator.uniform(-0.5, 0.5, len(score))
        old, reference = (np.where(sample.loss_mask, score - away, 0).astype(np.float32) for away in (log_ratio, gap))
        moved.append(replace(sample, old_logprobs=old, ref_logprobs=reference))
    return moved


def gather_that_sums(sequence: ulysses.SequenceGroup, *streams: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A gather whose backward adds up what all ranks of the group send; they send the same."""
    size = sequence.size
    return tuple(whole * size - (whole * (size - 1)).detach() for whole in GATHER(sequence, *streams))


def one_long_sequence(
    lengths: tuple[int, ...], device: torch.device, sequence: ulysses.SequenceGroup | None = None
) -> PackedLayout:
    """A layout that does not separate neighbours."""
    return LAYOUT((sum(lengths),), device, sequence)


def mesh_of_one_replica(plan: ParallelPlan) -> DeviceMesh:
    """The ranks that hold the model together, as if there were no others."""
    return MESH(plan)[SHARD_AXIS]


def load_where_all_count(spec: ModelSpec, plan: ParallelPlan, *, trainable: bool) -> ShardedModel:
    """A model of which every rank believes that it speaks for its group."""
    model = LOAD(spec, plan, trainable=trainable)
    model.counts = True
    return model


GATHER, LAYOUT, MESH, LOAD = ulysses.gather_tokens, PackedLayout.of, build.device_mesh, ShardedModel.load

FAULTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "none": nullcontext,
    "a gather that sums over the group": lambda: patch.object(sharded_model, "gather_tokens", gather_that_sums),
    "attention to the neighbour": lambda: patch.object(PackedLayout, "of", one_long_sequence),
    "an exchange that keeps its own": lambda: patch.object(ulysses, "swap_parts", lambda _, parts: parts.clone()),
    "gradients that stay where they arrive": lambda: patch.object(
        ulysses.Exchange, "backward", staticmethod(lambda _, gradient: (None, gradient.contiguous()))
    ),
    "key heads in another order": lambda: patch.object(
        ulysses, "repeated", lambda stream, repeats: stream.repeat(1, repeats, 1, 1)
    ),
    "every rank counts": lambda: patch.object(ShardedModel, "load", load_where_all_count),
    "replicas that do not add up": lambda: patch.object(build, "device_mesh", mesh_of_one_replica),
}
