"""What a rank does to be compared with recorded figures: a batch, forward and backward, its gradients described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cases
import numpy as np
from cases import Setup

from benchmarks.trl_reference import Answer, described
from chatlearn.records import Sample

# Norm and projections of every gradient, by stored name.
Described = dict[str, list[float]]


def samples_of(answers: Sequence[Answer]) -> list[Sample]:
    """The recorded batch as our trainer takes it; the engine's log-probabilities are in no gradient."""
    return [sample_of(answer) for answer in answers]


def sample_of(answer: Answer) -> Sample:
    mask = np.arange(len(answer.token_ids)) >= answer.num_prompt_tokens
    prompt = [0.0] * answer.num_prompt_tokens
    references = answer.ref_logprobs
    return Sample(
        prompt_uid="",
        token_ids=np.array(answer.token_ids, dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(mask), dtype=np.float32),
        advantages=np.where(mask, answer.advantage, 0).astype(np.float32),
        old_logprobs=np.array([*prompt, *answer.old_logprobs], dtype=np.float32),
        ref_logprobs=None if references is None else np.array([*prompt, *references], dtype=np.float32),
    )


def accumulated(
    setup: Setup, samples: Sequence[Sample], miscount: int = 0, dual: float | None = None
) -> tuple[float, Described]:
    """Loss and gradients of the whole batch.

    ``miscount`` and ``dual`` plant faults: a wrong number of loss tokens, another bound on the ratio.
    """
    trainer = cases.trainer_of(setup)
    if dual is not None:
        trainer.objective = replace(trainer.objective, clip=replace(trainer.objective.clip, dual=dual))
    batch = cases.mine(setup, samples)
    sums = trainer.accumulate(cases.my_share(setup, batch), batch.num_loss_tokens + miscount)
    return sums.parts.loss.item(), {name: described(name, gradient) for name, gradient in trainer.gradients()}
