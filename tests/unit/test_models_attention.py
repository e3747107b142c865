"""Packed attention is each sequence's own causal attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.errors import RunError
from chatlearn.models.attention import PackedLayout, packed_attention

SCALING = 0.4


def random_heads(length: int, seed: int, heads: int = 4, key_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, num, length, 8, generator=generator, dtype=torch.float64)
        for num in (heads, key_heads, key_heads)
    ]


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Softmax over a mask [T, T] that is block-diagonal and causal; [1, T, heads, head_dim]."""
    owner = torch.repeat_interleave(torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    visible = (owner[:, None] == owner) & (place[:, None] >= place)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    weights = (query @ key.transpose(-1, -2) * SCALING).masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def attend(streams: list[torch.Tensor], lengths: list[int], sliding_window: int | None = None) -> torch.Tensor:
    layout = PackedLayout.of(tuple(lengths), torch.device("cpu"))
    result, _ = packed_attention(
        torch.nn.Identity(), *streams, None, scaling=SCALING, packed=layout, sliding_window=sliding_window, dropout=0.0
    )
    return result


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_equals_a_block_diagonal_causal_mask(lengths: list[int], seed: int) -> None:
    streams = random_heads(sum(lengths), seed)
    torch.testing.assert_close(attend(streams, lengths), written_out(*streams, lengths))


def test_offsets_are_where_sequences_begin() -> None:
    layout = PackedLayout.of((3, 1, 4), torch.device("cpu"))
    assert layout.offsets.tolist() == [0, 3, 4, 8]
    assert layout.offsets.dtype == torch.int32


def test_a_sliding_window_that_would_cut_is_refused() -> None:
    streams = random_heads(8, seed=0)
    assert torch.equal(attend(streams, [5, 3], sliding_window=5), attend(streams, [5, 3]))
    with pytest.raises(RunError, match="a sequence of 5 tokens is longer than the model's sliding window of 4"):
        attend(streams, [5, 3], sliding_window=4)
