"""From a model's logits to the distribution that is sampled, in vLLM's order: penalties, temperature, truncation."""

from __future__ import annotations

import torch
from torch import Tensor

from chatlearn.rollout.engine import SamplingPlan


def processed_logits(logits: Tensor, prompt: Tensor, generated: Tensor, plan: SamplingPlan) -> Tensor:
    """Logits [V] whose softmax is what gets sampled after the tokens ``prompt`` [P] and ``generated`` [G].

    Repetition counts prompt and answer, presence and frequency the answer alone. Temperature 0 leaves the scale as it
    is; the caller takes the maximum.
    """
    logits = penalised(logits.float(), prompt, generated, plan)
    if plan.temperature > 0:
        logits = logits / plan.temperature
    if plan.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < plan.min_p * probabilities.max(), -torch.inf)
    if plan.top_k > 0:
        smallest_kept = logits.topk(min(plan.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    return nucleus(logits, plan.top_p) if plan.top_p < 1 else logits


def penalised(logits: Tensor, prompt: Tensor, generated: Tensor, plan: SamplingPlan) -> Tensor:
    """Make tokens that occurred less likely."""
    counts = torch.bincount(generated, minlength=logits.numel())
    occurred = counts + torch.bincount(prompt, minlength=logits.numel()) > 0
    repeated = torch.where(logits > 0, logits / plan.repetition_penalty, logits * plan.repetition_penalty)
    logits = torch.where(occurred, repeated, logits)
    return logits - plan.frequency_penalty * counts - plan.presence_penalty * (counts > 0)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities reach ``top_p``; always the most likely one."""
    ascending, order = logits.sort()
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    dropped[-1] = False
    return torch.empty_like(logits).scatter_(0, order, ascending.masked_fill(dropped, -torch.inf))
