"""From numbers per token to numbers per batch, with one denominator for all ranks."""

from __future__ import annotations

from torch import Tensor


def token_mean(values: Tensor, loss_mask: Tensor, num_loss_tokens: int) -> Tensor:
    """This micro-batch's part of the mean of ``values`` [T] over all loss tokens of the batch, a scalar.

    ``num_loss_tokens`` is counted once, over all ranks. The parts of all micro-batches of all ranks add up to the
    mean, so the result and its gradient do not depend on packing, ranks or micro-batch size.
    """
    return values.masked_fill(~loss_mask, 0.0).sum() / num_loss_tokens
