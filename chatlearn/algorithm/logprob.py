"""Hidden states to the log-probability of each label and the entropy of each guess, without a [T, V] tensor.

At 150,000 tokens of vocabulary the logits of 8,192 positions are 5 GB, their float32 softmax and its gradient as much
again each. Here the logits exist for ``chunk_rows`` positions at a time and are computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

# 256 rows of 151,936 logits are 156 MB in float32, and both passes hold two such tensors at most. More rows make the
# product no faster on a processor. An accelerator would spend its time on adding up the head's gradient, which it
# reads and writes once a chunk: 2,048 rows, 1.2 GB, make that an eighth of the work.
HOST_CHUNK_ROWS = 256
ACCELERATOR_CHUNK_ROWS = 2048


def token_logprobs_and_entropy(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, temperature: float = 1.0, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of ``labels`` [T] and entropy of the distribution, both [T], in nats.

    The distribution is ``softmax(hidden @ head_weight.T / temperature)`` with ``hidden`` [T, H] and ``head_weight``
    [V, H]. Products of bfloat16 inputs are accumulated and kept in float32: logits rounded to bfloat16 would cost
    0.01 to 0.06 nats a token. The results are float32 (float64 for float64 inputs). Both are differentiable with
    respect to ``hidden`` and ``head_weight``; the entropy's share of the backward pass is only done when a gradient
    arrives at the entropy.
    """
    assert hidden.ndim == 2, "hidden states are [T, H]"
    assert labels.shape == hidden.shape[:1], "one label for each position"
    fitting = HOST_CHUNK_ROWS if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_ROWS
    results = ChunkedLogprobs.apply(hidden, head_weight, labels, Chunking(temperature, chunk_rows or fitting))
    # apply() is untyped; it returns what forward() returns.
    return cast("tuple[Tensor, Tensor]", results)


@dataclass(frozen=True)
class Chunking:
    """The numbers that both passes share."""

    temperature: float
    rows: int

    def slices(self, num_rows: int) -> list[slice]:
        """The rows of each chunk, in order."""
        return [slice(start, min(start + self.rows, num_rows)) for start in range(0, num_rows, self.rows)]


class SavedContext(FunctionCtx):
    """What forward leaves for backward."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    chunking: Chunking


class ChunkedLogprobs(Function):
    """Forward keeps two numbers per row, log-sum-exp and entropy; backward computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: SavedContext, hidden: Tensor, head_weight: Tensor, labels: Tensor, chunking: Chunking
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy, [T] each."""
        dtype = wide_dtype(hidden)
        logprobs, entropy, log_total = hidden.new_empty((3, hidden.shape[0]), dtype=dtype)
        for rows in chunking.slices(hidden.shape[0]):
            logits = wide_product(hidden[rows], head_weight.T).div_(chunking.temperature)  # [rows, V]
            highest = logits.amax(dim=-1)
            # Below zero from here on, so that the differences of two logarithms lose no digits.
            likelihood = logits.sub_(highest[:, None]).exp()
            total = likelihood.sum(dim=-1)
            log_total[rows] = highest + total.log()
            logprobs[rows] = logits.gather(-1, labels[rows, None]).squeeze(-1) - total.log()
            entropy[rows] = total.log() - torch.linalg.vecdot(likelihood, logits) / total
        ctx.save_for_backward(hidden, head_weight, labels, log_total, entropy)
        ctx.chunking = chunking
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    # torch declares backward(ctx, *gradients) because their number is that of forward's results: two, here.
    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: SavedContext, logprob_grad: Tensor | None, entropy_grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of hidden states and head weight."""
        hidden, head_weight, labels, log_total, entropy = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = wide_dtype(hidden)
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        # Summed over chunks in float32, because sixteen roundings to bfloat16 would eat small contributions.
        weight_grad = torch.zeros_like(head_weight, dtype=dtype) if wants_weight else None
        for rows in ctx.chunking.slices(hidden.shape[0]):
            logits_grad = chunk_gradient(
                wide_product(hidden[rows], head_weight.T).div_(ctx.chunking.temperature).sub_(log_total[rows, None]),
                labels[rows],
                None if logprob_grad is None else logprob_grad[rows] / ctx.chunking.temperature,
                None if entropy_grad is None else entropy_grad[rows] / ctx.chunking.temperature,
                entropy[rows],
            ).to(hidden.dtype)  # [rows, V]
            if hidden_grad is not None:
                hidden_grad[rows] = logits_grad @ head_weight
            if weight_grad is not None:
                add_product(weight_grad, logits_grad.T, hidden[rows])
        return hidden_grad, None if weight_grad is None else weight_grad.to(head_weight.dtype), None, None


def chunk_gradient(
    log_distribution: Tensor, labels: Tensor, logprob_grad: Tensor | None, entropy_grad: Tensor | None, entropy: Tensor
) -> Tensor:
    """Gradient of the logits, [rows, V], made in the memory of ``log_distribution`` and at most one tensor more.

    With ``p`` the distribution, ``g`` and ``e`` the gradients of label's log-probability and entropy ``E``, it is
    ``g`` at the label, minus ``p (g + e (log p + E))`` everywhere.
    """
    if entropy_grad is None:
        pull = torch.zeros_like(entropy) if logprob_grad is None else logprob_grad
        gradient = log_distribution.exp_().mul_(-pull[:, None])
    else:
        pull = entropy_grad * entropy if logprob_grad is None else logprob_grad + entropy_grad * entropy
        gradient = log_distribution.exp()
        gradient.mul_(log_distribution.mul_(-entropy_grad[:, None]).sub_(pull[:, None]))
    if logprob_grad is not None:
        gradient.scatter_add_(-1, labels[:, None], logprob_grad[:, None])
    return gradient


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in ``total``'s own memory where the kernels can."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += wide_product(left, right)


def wide_dtype(values: Tensor) -> torch.dtype:
    """float32 for half precision, the tensor's own otherwise."""
    return torch.promote_types(values.dtype, torch.float32)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` with float32 (or wider) results, without rounding them to the inputs' half precision first."""
    if left.dtype == wide_dtype(left):
        return left @ right
    if left.device.type == "cpu":  # the CPU kernels have no mixed product; half precision is for tests there
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)
