"""What a step minimises: a loss of a user's own is held to its shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from chatlearn.algorithm.loss import ClipRange, LossInputs
from chatlearn.batch.pack import micro_batch
from chatlearn.errors import ConfigError
from chatlearn.records import Sample
from chatlearn.trainer.objective import Objective, objective_parts

CLIP = ClipRange(low=0.2, high=0.28, max_log_ratio=10.0, dual=3.0)


def averaged(inputs: LossInputs, _clip: ClipRange) -> Tensor:
    return -(inputs.logprobs * inputs.advantages).mean()


def per_token(inputs: LossInputs, _clip: ClipRange) -> Tensor:
    return -(inputs.logprobs * inputs.advantages)


def test_a_loss_that_is_averaged_already_is_refused_and_not_spread_over_the_tokens() -> None:
    mask = np.arange(6) >= 2
    numbers = np.where(mask, -1.0, 0.0).astype(np.float32)
    sample = Sample("a", np.arange(6, dtype=np.int32), mask, numbers, -numbers)
    batch = micro_batch([sample], (0,))
    logprobs = torch.full((6,), -1.0, requires_grad=True)
    assert objective_parts(Objective(per_token, CLIP), batch, logprobs, torch.zeros(6), 4).pg_loss.item() == 1.0
    with pytest.raises(ConfigError, match=r"models.policy_trainer.loss: .* shape \(\) for 6 tokens"):
        objective_parts(Objective(averaged, CLIP), batch, logprobs, torch.zeros(6), 4)
