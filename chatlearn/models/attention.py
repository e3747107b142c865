"""Causal attention over sequences that lie end to end in one row, without padding and without a mask tensor.

The layout of the row travels through transformers' forward as the keyword ``packed``; the function itself is looked up
by name in transformers' attention interface. No mask function goes with it: transformers then builds no mask, and the
layout alone keeps sequences apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from chatlearn.device import to_device
from chatlearn.errors import RunError
from chatlearn.models.ulysses import SequenceGroup, repeated, to_slice_of_heads, to_slice_of_tokens

PACKED_ATTENTION = "chatlearn_packed"

# Kernels that cut one row into sequences exist for half precision on accelerators only.
VARLEN_DTYPES = (torch.bfloat16, torch.float16)

# Older versions of torch take fewer key heads than query heads without being told.
VARLEN = partial(varlen_attn, enable_gqa=True) if "enable_gqa" in signature(varlen_attn).parameters else varlen_attn


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where the sequences of a row begin and end: their lengths, and ``offsets`` int32 [num_sequences + 1].

    With a ``sequence`` group the layout is that of the whole row, and each rank of the group has a slice of it.
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    sequence: SequenceGroup | None = None

    @staticmethod
    def of(lengths: tuple[int, ...], device: torch.device, sequence: SequenceGroup | None = None) -> PackedLayout:
        """The layout of sequences that follow each other without a gap; T is the sum of their lengths."""
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return PackedLayout(lengths, to_device(offsets, device), sequence)


def register_packed_attention() -> None:
    """Make ``attn_implementation=PACKED_ATTENTION`` known to transformers; harmless when repeated."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def packed_attention(  # noqa: PLR0913 - the signature is transformers'
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, key_heads, T, head_dim]
    value: Tensor,  # [1, key_heads, T, head_dim]
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: PackedLayout,
    sliding_window: int | None = None,
    **_ignored: object,  # dropout, position_ids and what else transformers offers its own back-ends
) -> tuple[Tensor, None]:
    """Attention of each token to itself and the earlier tokens of its own sequence; [1, T, heads, head_dim].

    Where ranks share the row, T is what this rank has of it, in the arguments as in the result.
    """
    assert attention_mask is None, "the layout separates sequences; a mask would be ignored"
    longest = max(packed.lengths)
    if sliding_window is not None and longest > sliding_window:
        raise RunError(
            f"a sequence of {longest} tokens is longer than the model's sliding window of {sliding_window}, and "
            "training with sliding-window attention is not supported; shorten max_prompt_tokens_length and "
            "max_response_tokens_length"
        )
    if packed.sequence is None:
        return _whole_rows(query, key, value, scaling, packed), None
    streams = to_slice_of_heads(packed.sequence, query, key, value)
    return to_slice_of_tokens(packed.sequence, _whole_rows(*streams, scaling, packed)), None


def _whole_rows(query: Tensor, key: Tensor, value: Tensor, scaling: float, packed: PackedLayout) -> Tensor:
    if query.device.type != "cpu" and query.dtype in VARLEN_DTYPES:
        return _varlen(query, key, value, scaling, packed)
    return _one_by_one(query, key, value, scaling, packed)


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float, packed: PackedLayout) -> Tensor:
    longest = max(packed.lengths)
    queries, keys, values = (
        stream.squeeze(0).transpose(0, 1).contiguous() for stream in (query, key, value)
    )  # [T, heads, head_dim]
    attended = VARLEN(
        queries,
        keys,
        values,
        packed.offsets,
        packed.offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
    )
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, scaling: float, packed: PackedLayout) -> Tensor:
    if query.device.type != "cpu":  # where the only kernel that takes fewer key heads makes a table of all pairs
        key, value = (repeated(stream, query.shape[1] // key.shape[1]) for stream in (key, value))
    shares_key_heads = query.shape[1] != key.shape[1]
    streams = zip(*(stream.split(packed.lengths, dim=2) for stream in (query, key, value)), strict=True)
    attended = [
        scaled_dot_product_attention(*stream, is_causal=True, scale=scaling, enable_gqa=shares_key_heads)
        for stream in streams
    ]
    return torch.cat(attended, dim=2).transpose(1, 2)
