"""Ulysses sequence parallelism (arXiv:2309.14509): several ranks share one row of tokens.

Between attentions each rank of a sequence group works on its slice of the tokens, with all heads. Attention needs whole
rows, so the ranks trade: each gets all tokens of its slice of the heads, and afterwards gives the results back. What a
loss needs of every token is gathered at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The ranks that share a row of tokens, in the order of their slices; ``rank`` is our number among them."""

    process_group: ProcessGroup
    rank: int
    size: int

    def num_padding(self, num_tokens: int) -> int:
        """How many tokens must follow a row, so that it can be cut into slices of the same length."""
        return -num_tokens % self.size

    def share(self, stream: Tensor) -> Tensor:
        """Our slice of a stream [T, ...], whose length the group divides."""
        return stream.chunk(self.size)[self.rank]

    def padded_share(self, stream: Tensor) -> Tensor:
        """Our slice of a stream [T, ...] of any length; zeros stand where the padding is."""
        to_the_end = [0] * (2 * stream.ndim - 1) + [self.num_padding(len(stream))]  # pad() begins with the last axis
        return self.share(pad(stream, to_the_end))


class SavedGroup(FunctionCtx):
    """What forward leaves for backward."""

    sequence: SequenceGroup


def gather_tokens(sequence: SequenceGroup, *streams: Tensor) -> tuple[Tensor, ...]:
    """Our slices [T / size] of several streams to whole ones [T], on every rank of the group.

    Every rank is expected to compute the same from the result. So backward keeps our slice of the gradient and
    communicates nothing: a sum over the group would count each token ``size`` times.
    """
    # apply() is untyped; it returns what forward() returns.
    return cast("tuple[Tensor, ...]", GatherTokens.apply(sequence, *streams))


class GatherTokens(Function):
    """All streams in one collective; where no gradient arrives, none is made up."""

    @staticmethod
    def forward(ctx: SavedGroup, sequence: SequenceGroup, *streams: Tensor) -> tuple[Tensor, ...]:
        """Whole streams."""
        ctx.sequence = sequence
        ctx.set_materialize_grads(False)
        ours = torch.stack(streams)  # [streams, T / size]
        slices = [torch.empty_like(ours) for _ in range(sequence.size)]
        dist.all_gather(slices, ours, group=sequence.process_group)
        return tuple(torch.cat(whole) for whole in zip(*slices, strict=True))

    # torch names the first parameter for callers that use keywords; the engine does not.
    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: SavedGroup, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Our slice of each gradient."""
        return (None, *(None if gradient is None else ctx.sequence.share(gradient) for gradient in gradients))


def to_slice_of_heads(
    sequence: SequenceGroup, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of our tokens to all tokens of our heads, in one exchange.

    ``[1, heads, T / size, head_dim]`` becomes ``[1, heads / size, T, head_dim]``. Where the group does not divide the
    key heads, they are repeated first; which of them a query head belongs to stays the same.
    """
    repeats = key_head_repeats(query.shape[1], key.shape[1], sequence.size)
    streams = (query, repeated(key, repeats), repeated(value, repeats))
    parts = [stream[0].unflatten(0, (sequence.size, -1)).transpose(1, 2) for stream in streams]
    num_heads = [part.shape[2] for part in parts]
    rows = exchange(sequence, torch.cat(parts, dim=2)).flatten(0, 1)  # [T, heads of all three, head_dim]
    queries, keys, values = (stream.transpose(0, 1)[None] for stream in rows.split(num_heads, dim=1))
    return queries, keys, values


def to_slice_of_tokens(sequence: SequenceGroup, attended: Tensor) -> Tensor:
    """The way back: ``[1, T, heads / size, head_dim]`` becomes ``[1, T / size, heads, head_dim]``."""
    parts = exchange(sequence, attended[0].unflatten(0, (sequence.size, -1)))  # [size, T / size, our heads, head_dim]
    return parts.transpose(0, 1).flatten(1, 2)[None]


def key_head_repeats(num_heads: int, num_key_heads: int, size: int) -> int:
    """How often each key head must be there, at least, so that ``size`` ranks can hold equally many.

    >>> key_head_repeats(num_heads=32, num_key_heads=8, size=4)
    1
    >>> key_head_repeats(num_heads=32, num_key_heads=2, size=8)
    4
    """
    assert num_heads % num_key_heads == 0, "query heads share key heads in groups of one size"
    assert num_heads % size == 0, "the plan was checked against the model"
    queries_per_key = num_heads // num_key_heads
    return next(
        repeats
        for repeats in range(1, queries_per_key + 1)
        if queries_per_key % repeats == 0 and num_key_heads * repeats % size == 0
    )


def repeated(stream: Tensor, repeats: int) -> Tensor:
    """Every head ``repeats`` times in succession; the stream itself for one."""
    return stream[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def exchange(sequence: SequenceGroup, parts: Tensor) -> Tensor:
    """Give ``parts[i]`` to rank *i* of the group and take its part for us; ``[size, ...]`` to ``[size, ...]``."""
    return cast("Tensor", Exchange.apply(sequence, parts))  # apply() is untyped


class Exchange(Function):
    """An exchange undoes itself, so backward is the same exchange of the gradients."""

    @staticmethod
    def forward(ctx: SavedGroup, sequence: SequenceGroup, parts: Tensor) -> Tensor:
        """What the others have for us, in the order of ranks."""
        ctx.sequence = sequence
        return swap_parts(sequence, parts)

    # torch declares backward(ctx, *gradients) because their number is that of forward's results: one, here.
    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: SavedGroup, gradient: Tensor
    ) -> tuple[None, Tensor]:
        """The gradient of each part goes back to where the part came from."""
        return None, swap_parts(ctx.sequence, gradient)


def swap_parts(sequence: SequenceGroup, parts: Tensor) -> Tensor:
    """The collective behind ``exchange``, without a gradient."""
    received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
    dist.all_to_all_single(received, parts.contiguous(), group=sequence.process_group)
    return received
