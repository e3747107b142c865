"""What the ranks of a gang do in the tests of replay, and a loss with a planted fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from cases import Setup, step, trainer_of
from torch import Tensor

from chatlearn.algorithm.loss import ClipRange, LossInputs, clipped_surrogate
from chatlearn.checkpoint.capsule import walk, write_weights
from chatlearn.checkpoint.sharded import save_random_states
from chatlearn.errors import ConfigError
from chatlearn.models.lora import LoraSpec
from chatlearn.records import Sample, StepStats
from chatlearn.replay.measure import measure
from chatlearn.replay.trial import Trial
from chatlearn.trainer.adapter import adapter_weights
from chatlearn.trainer.build import ModelSpec


@dataclass(frozen=True)
class RecordedSetup(Setup):
    """A setup that may train an adapter."""

    lora: LoraSpec | None = None

    def spec(self) -> ModelSpec:
        return replace(super().spec(), lora=self.lora)


def record_second_step(setup: RecordedSetup, samples: Sequence[Sample], staging: Path) -> StepStats:
    """Take a step, so that the weights are nobody else's; record the next one; take it, and say what it reports."""
    trainer = trainer_of(setup)
    step(trainer, setup, samples)
    model = trainer.model
    save_random_states(staging, model.module)
    base, adapter = model.export_base("float32"), adapter_weights(model.module)
    if dist.get_rank() == 0:
        write_weights(staging, base, adapter, setup.path)
    else:
        walk(base, adapter)
    return step(trainer, setup, samples)


def loss_of_the_split(inputs: LossInputs, clip: ClipRange) -> Tensor:
    """The fault: a token weighs more, the more sequences share its micro-batch."""
    return clipped_surrogate(inputs, clip) * (1 + 0.001 * len(inputs.lengths))


def refusal(trial: Trial) -> str:
    """What a replay says that cannot be; nothing where it can."""
    try:
        measure(trial)
    except ConfigError as error:
        return str(error)
    return ""
