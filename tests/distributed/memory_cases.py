"""What the ranks of a gang do in the tests of memory and initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cases
import numpy as np
import torch
from cases import Setup, Weights
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from chatlearn.models.stored_weights import StoredWeights
from chatlearn.records import Sample, StepStats
from chatlearn.trainer.load import fill
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.recompute import KEPT
from chatlearn.trainer.residency import Residency
from chatlearn.trainer.sharded_model import ShardedModel


@dataclass(frozen=True)
class Outcome:
    """What a few steps reported, and the scores and weights after them."""

    stats: list[StepStats]
    scores: list[NDArray[np.float32]]
    weights: Weights


class AttentionCount(TorchDispatchMode):
    """Counts how often an attention kernel runs forward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in KEPT
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Cost:
    """How often attention ran in a forward and in its backward, and what came out."""

    attention_in_forward: int
    attention_in_backward: int
    gradients: Weights


def cost_of_a_step(setup: Setup, samples: Sequence[Sample]) -> Cost:
    """Forward and backward over this rank's one micro-batch."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    model.module.train()
    (micro_batch,) = cases.my_share(setup, cases.mine(setup, samples))
    with AttentionCount() as forward:
        logprobs, _ = model.score(micro_batch)
    with AttentionCount() as backward:
        logprobs.sum().backward()
    gradients = {name: whole(parameter.grad).numpy() for name, parameter in model.module.named_parameters()}
    return Cost(forward.count, backward.count, gradients)


def bytes_kept(setup: Setup, samples: Sequence[Sample]) -> int:
    """What a forward allocates and does not free, as it is needed for the backward."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    model.module.train()
    (micro_batch,) = cases.my_share(setup, cases.mine(setup, samples))
    model.score(micro_batch)[0].sum().backward()  # what is allocated once for all steps does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        logprobs, _ = model.score(micro_batch)
    logprobs.sum().backward()
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def whole(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def train_on_device(setup: Setup, samples: Sequence[Sample]) -> Outcome:
    """With nothing moved."""
    trainer = cases.trainer_of(setup)
    stats = [cases.step(trainer, setup, samples) for _ in range(setup.num_steps)]
    return Outcome(stats, cases.scores_of(trainer.model, setup, samples), cases.exported(trainer.model))


def train_on_host(setup: Setup, samples: Sequence[Sample]) -> Outcome:
    """With shards that stay on the host."""
    model = ShardedModel.load(replace(setup.spec(), on_host=True), setup.plan(), trainable=True)
    # On the CPU no number and no place tells whether FSDP was asked to leave shards on the host.
    groups = [group for part in fsdp_parts(model) for group in fully_shard.state(part)._fsdp_param_groups]
    assert all(parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params)
    trainer = PolicyTrainer(model, setup.optimizer(), setup.objective())
    stats = [cases.step(trainer, setup, samples) for _ in range(setup.num_steps)]
    return Outcome(stats, cases.scores_of(model, setup, samples), cases.exported(model))


def fsdp_parts(model: ShardedModel) -> list[FSDPModule]:
    return [part for part in model.module.modules() if isinstance(part, FSDPModule)]


@dataclass(frozen=True)
class Journey:
    """Where memory began, by name: on the device, at home, and back on the device, for each journey."""

    weights: list[dict[str, int]]
    states: list[dict[str, int]]


def train_between_journeys(setup: Setup, samples: Sequence[Sample]) -> tuple[Outcome, Journey]:
    """With everything sent home and brought back before each step and once more before scoring.

    Host memory plays the device: the copies are real, though nothing is pinned and no stream is there to overlap.
    """
    trainer = cases.trainer_of(setup)
    residency = Residency(trainer.model, trainer.optimizer)
    assert not residency.moves, "on the CPU nothing has to move"
    residency.moves = True
    stats, journey = [], Journey([], [])
    for _ in range(setup.num_steps):
        there_and_back(residency, journey)
        stats.append(cases.step(trainer, setup, samples))
    there_and_back(residency, journey)
    outcome = Outcome(stats, cases.scores_of(trainer.model, setup, samples), cases.exported(trainer.model))
    return outcome, journey


def there_and_back(residency: Residency, journey: Journey) -> None:
    """Home, where a second call finds nothing to do, and back."""
    note(residency, journey)
    for _ in range(2):
        residency.send_optimizer_home()
        residency.send_weights_home()
    note(residency, journey)
    for _ in range(2):
        residency.bring_weights()
        residency.bring_optimizer()
    note(residency, journey)


def note(residency: Residency, journey: Journey) -> None:
    """Write down where everything lies; empty shards lie nowhere."""
    module, optimizer = residency.model.module, residency.optimizer
    assert optimizer is not None
    journey.weights.append({name: address(parameter) for name, parameter in module.named_parameters()})
    journey.states.append(
        {
            f"{number}.{name}": address(value)
            for number, state in enumerate(optimizer.state.values())
            for name, value in state.items()
        }
    )


def address(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


class CountingWeights(StoredWeights):
    """Counts the numbers that are read."""

    num_read = 0

    def rows(self, name: str, expected: tuple[int, ...], start: int, stop: int) -> Tensor:
        """As the original."""
        found = super().rows(name, expected, start, stop)
        self.num_read += found.numel()
        return found


def numbers_read(setup: Setup, trainable: bool) -> tuple[int, bool]:
    """How many stored numbers this rank reads to initialise its part, and whether that part is then the checkpoint's.

    The module has been initialised before, and is overwritten, so that what is not read again shows.
    """
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=trainable)
    before = cases.exported(model)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(torch.nan)
    with CountingWeights(setup.path) as stored:
        fill(model.module, model.family, stored)
        num_read = stored.num_read
    return num_read, cases.worst_difference(cases.exported(model), before) == 0.0


def head_and_embedding(setup: Setup, trainable: bool) -> tuple[bool, Weights]:
    """Whether the head's weight is the embedding's own, and all weights."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=trainable)
    scorer = model.module
    return scorer.head_weight() is scorer.model.get_input_embeddings().weight, cases.exported(model)
