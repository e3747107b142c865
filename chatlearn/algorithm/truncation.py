"""Distributions with unlikely tokens cut off, in vLLM's order: what engines sample from, and its log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chatlearn.algorithm.logprob import HOST_CHUNK_ROWS, wide_product


@dataclass(frozen=True)
class Truncation:
    """Which tokens can be sampled: ``min_p``, then ``top_k`` (0: all), then ``top_p`` of what these leave."""

    top_p: float
    top_k: int
    min_p: float


@torch.no_grad()
def truncated_logprobs(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, temperature: float, truncation: Truncation
) -> tuple[Tensor, Tensor]:
    """Log-probability of ``labels`` [T], minus infinity where they were cut off; the second stream is zeros.

    ``hidden`` is [T, H] and ``head_weight`` [V, H]; of the logits a few hundred rows exist at a time.
    """
    logprobs = hidden.new_zeros(len(hidden), dtype=torch.float32)
    for start in range(0, len(hidden), HOST_CHUNK_ROWS):
        rows = slice(start, start + HOST_CHUNK_ROWS)
        logits = wide_product(hidden[rows], head_weight.T) / temperature  # [rows, V]
        kept = truncated(logits, truncation).log_softmax(-1)
        logprobs[rows] = kept.gather(-1, labels[rows, None]).squeeze(-1)
    return logprobs, torch.zeros_like(logprobs)


def truncated(logits: Tensor, truncation: Truncation) -> Tensor:
    """Logits [rows, V] with minus infinity for every token that cannot be sampled.

    >>> truncated(torch.tensor([[0.5, 0.3, 0.2]]).log(), Truncation(top_p=0.6, top_k=0, min_p=0.0)).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    descending, order = logits.sort(-1, descending=True)
    best = descending[:, :1]
    if truncation.min_p > 0:
        likelihood = (descending - best).exp()
        descending = descending.masked_fill(likelihood < truncation.min_p, -torch.inf)
    if truncation.top_k > 0:
        smallest_kept = descending[:, min(truncation.top_k, descending.shape[1]) - 1, None]
        descending = descending.masked_fill(descending < smallest_kept, -torch.inf)
    if truncation.top_p < 1:
        probabilities = descending.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        dropped = before >= truncation.top_p
        dropped[:, 0] = False
        descending = descending.masked_fill(dropped, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, descending)
