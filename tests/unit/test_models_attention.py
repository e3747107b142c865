"""Packed attention is each sequence's own causal attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.errors import RunError
from chatlearn.models.attention import PackedLayout, packed_attention
from chatlearn.models.ulysses import SequenceGroup, key_head_repeats, repeated

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


def test_a_sliding_window_is_held_against_whole_sequences_not_slices() -> None:
    layout = PackedLayout.of((5, 3), torch.device("cpu"), SequenceGroup(None, 0, 2))
    with pytest.raises(RunError, match="a sequence of 5 tokens"):
        packed_attention(
            torch.nn.Identity(), *random_heads(4, seed=0), None, scaling=SCALING, packed=layout, sliding_window=4
        )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(key_heads=st.integers(1, 8), queries_per_key=st.integers(1, 8), data=st.data())
def test_key_heads_are_repeated_no_more_than_needed(key_heads: int, queries_per_key: int, data: st.DataObject) -> None:
    num_heads = key_heads * queries_per_key
    size = data.draw(st.sampled_from([size for size in range(1, num_heads + 1) if num_heads % size == 0]))
    repeats = key_head_repeats(num_heads, key_heads, size)
    enough = [number for number in range(1, num_heads + 1) if num_heads % (key_heads * number) == 0]
    assert repeats == min(number for number in enough if key_heads * number % size == 0)


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_repeated_key_heads_serve_the_same_queries(repeats: int) -> None:
    query, key, value = random_heads(7, seed=1, heads=8, key_heads=2)
    expected = attend([query, key, value], [4, 3])
    found = attend([query, repeated(key, repeats), repeated(value, repeats)], [4, 3])
    torch.testing.assert_close(found, expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(length=st.integers(1, 20), size=st.integers(1, 8))
def test_slices_put_together_are_the_padded_row(length: int, size: int) -> None:
    row = torch.arange(1, length + 1)
    slices = [SequenceGroup(None, rank, size).padded_share(row) for rank in range(size)]
    assert len({len(part) for part in slices}) == 1
    whole = torch.cat(slices)
    assert torch.equal(whole[:length], row)
    assert len(whole) - length == SequenceGroup(None, 0, size).num_padding(length) < size
    assert not whole[length:].any()
    wide = torch.stack([row, -row], dim=1)  # [T, 2]: only tokens are padded
    assert torch.equal(SequenceGroup(None, 0, size).padded_share(wide)[:, 1], -slices[0])
