"""From a model's logits to the distribution that is sampled, in vLLM's order: penalties, temperature, truncation."""

from __future__ import annotations

import torch
from torch import Tensor

from chatlearn.algorithm.truncation import Truncation, truncated
from chatlearn.rollout.engine import SamplingPlan


def processed_logits(logits: Tensor, prompt: Tensor, generated: Tensor, plan: SamplingPlan) -> Tensor:
    """Logits [V] whose softmax is what gets sampled after the tokens ``prompt`` [P] and ``generated`` [G].

    Repetition counts prompt and answer, presence and frequency the answer alone. Temperature 0 leaves the scale as it
    is; the caller takes the maximum.
    """
    logits = penalised(logits.float(), prompt, generated, plan)
    if plan.temperature > 0:
        logits = logits / plan.temperature
    if plan.truncates:
        logits = truncated(logits[None], Truncation(plan.top_p, plan.top_k, plan.min_p))[0]
    return logits


def penalised(logits: Tensor, prompt: Tensor, generated: Tensor, plan: SamplingPlan) -> Tensor:
    """Make tokens that occurred less likely."""
    counts = torch.bincount(generated, minlength=logits.numel())
    occurred = counts + torch.bincount(prompt, minlength=logits.numel()) > 0
    repeated = torch.where(logits > 0, logits / plan.repetition_penalty, logits * plan.repetition_penalty)
    logits = torch.where(occurred, repeated, logits)
    return logits - plan.frequency_penalty * counts - plan.presence_penalty * (counts > 0)
