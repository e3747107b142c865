"""Laws of packing: alignment, round trip, one denominator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.batch.pack import COLUMNS, MicroBatch, TrainBatch, pack, unpack
from chatlearn.batch.plan import BatchLayout
from chatlearn.records import Sample

laws = settings(max_examples=60, deadline=None, derandomize=True)
LAYOUTS = st.builds(
    BatchLayout,
    num_data_ranks=st.integers(1, 4),
    packing=st.booleans(),
    max_tokens=st.integers(1, 40),
    micro_batch_size=st.integers(1, 4),
)


def sample_of(seed: int, length: int, num_prompt_tokens: int) -> Sample:
    """A sample whose every number is different, so that a shift by one cannot hide."""
    generator = np.random.default_rng(seed)
    mask = np.arange(length) >= num_prompt_tokens

    def numbers() -> np.ndarray:
        return np.where(mask, generator.normal(size=length), 0).astype(np.float32)

    return Sample(
        prompt_uid=f"prompt-{seed}",
        token_ids=generator.integers(1, 500, size=length).astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=numbers(),
        advantages=numbers(),
        old_logprobs=numbers(),
        ref_logprobs=numbers(),
        routed_experts=generator.integers(0, 200, size=(max(0, length - seed % 3), 3, 2)).astype(np.uint8),
    )


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    shapes = draw(st.lists(st.tuples(st.integers(1, 15), st.integers(0, 15)), min_size=1, max_size=12))
    return [sample_of(seed, length, prompt) for seed, (length, prompt) in enumerate(shapes)]


def micro_batches(batch: TrainBatch) -> list[MicroBatch]:
    return [micro for rank in batch.ranks for micro in rank]


@laws
@given(sample_lists(), LAYOUTS)
def test_every_guess_is_aligned_with_the_token_it_guesses(samples: list[Sample], layout: BatchLayout) -> None:
    """Against a naive reference: one sequence, one position at a time."""
    for micro in micro_batches(pack(samples, layout)):
        start = 0
        for index, length in zip(micro.samples, micro.lengths, strict=False):
            sample = samples[index]
            assert length == len(sample.token_ids)
            for position in range(length):
                here, is_last = start + position, position == length - 1
                assert micro.token_ids[here] == sample.token_ids[position]
                assert micro.position_ids[here] == position
                assert micro.labels[here] == (0 if is_last else sample.token_ids[position + 1])
                assert micro.loss_mask[here] == (False if is_last else sample.loss_mask[position + 1])
                for name in ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs"):
                    expected = 0.0 if is_last else vars(sample)[name][position + 1]
                    assert vars(micro)[name][here] == expected
                routed = micro.routed_experts
                assert routed is not None
                known = position < len(sample.routed_experts)
                assert routed[here].tolist() == (sample.routed_experts[position].tolist() if known else [[-1, -1]] * 3)
            start += length


@laws
@given(sample_lists(), LAYOUTS)
def test_unpack_mirrors_pack(samples: list[Sample], layout: BatchLayout) -> None:
    batch = pack(samples, layout)
    streams = unpack(batch, [[micro.rollout_logprobs for micro in rank] for rank in batch.ranks])
    assert batch.num_samples == len(streams) == len(samples)
    for sample, by_token in zip(samples, streams, strict=True):
        assert by_token.dtype == np.float32
        assert by_token[0] == 0.0
        np.testing.assert_array_equal(by_token[1:], sample.rollout_logprobs[1:])


@laws
@given(sample_lists(), LAYOUTS)
def test_loss_tokens_are_counted_once_over_all_ranks(samples: list[Sample], layout: BatchLayout) -> None:
    batch = pack(samples, layout)
    assert batch.num_loss_tokens == sum(int(micro.loss_mask.sum()) for micro in micro_batches(batch))


@laws
@given(sample_lists(), LAYOUTS)
def test_every_micro_batch_has_tokens_and_a_filler_has_no_loss(samples: list[Sample], layout: BatchLayout) -> None:
    batch = pack(samples, layout)
    assert len({len(rank) for rank in batch.ranks}) == 1
    for micro in micro_batches(batch):
        assert micro.num_tokens == sum(micro.lengths) == len(micro.token_ids) >= 1
        if not micro.samples:
            assert micro.lengths == (1,)
            assert not micro.loss_mask.any()


@pytest.mark.parametrize("present", [(), ("old_logprobs",), ("ref_logprobs", "routed_experts")])
def test_optional_streams_are_there_on_all_micro_batches_or_on_none(present: tuple[str, ...]) -> None:
    optional = ("old_logprobs", "ref_logprobs", "routed_experts")
    sample = sample_of(seed=3, length=5, num_prompt_tokens=2)
    sample = replace(sample, **{name: None for name in optional if name not in present})
    batch = pack([sample], BatchLayout(num_data_ranks=2, packing=True, max_tokens=8, micro_batch_size=1))
    assert [bool(micro.samples) for micro in micro_batches(batch)] == [True, False]
    for micro in micro_batches(batch):
        assert all((vars(micro)[name] is not None) == (name in present) for name in optional)


def test_dtypes_are_the_declared_ones() -> None:
    (micro,) = micro_batches(pack([sample_of(1, 4, 1)], BatchLayout(1, True, 8, 1)))
    assert {name: vars(micro)[name].dtype for name in COLUMNS} == {
        name: column.dtype for name, column in COLUMNS.items()
    }
    assert micro.token_ids.dtype == micro.labels.dtype == torch.int64


def test_moving_keeps_everything() -> None:
    (micro,) = micro_batches(pack([replace(sample_of(1, 4, 1), ref_logprobs=None)], BatchLayout(1, True, 8, 1)))
    moved = micro.to(torch.device("meta"))
    assert moved.token_ids.device.type == moved.loss_mask.device.type == "meta"
    assert moved.ref_logprobs is None
    assert (moved.lengths, moved.samples) == (micro.lengths, micro.samples)


def test_a_stream_of_numbers_that_ends_early_is_refused() -> None:
    sample = sample_of(1, 6, 1)
    with pytest.raises(AssertionError, match="4 entries for 6 tokens"):
        pack([replace(sample, advantages=sample.advantages[:5])], BatchLayout(1, True, 8, 1))


def test_a_batch_of_half_optional_streams_is_refused() -> None:
    samples = [sample_of(1, 4, 1), replace(sample_of(2, 4, 1), old_logprobs=None)]
    with pytest.raises(AssertionError, match="all samples"):
        pack(samples, BatchLayout(1, True, 8, 1))
