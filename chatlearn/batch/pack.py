"""Samples to micro-batches and back: the only place where the two alignments meet.

In a ``Sample`` entry *i* describes token *i*. In a ``MicroBatch`` entry *i* describes the guess made at position *i*,
that is token *i + 1* of the same sequence. Nothing after ``pack`` and before ``unpack`` shifts a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatlearn.batch.plan import BatchLayout, plan
from chatlearn.device import to_device
from chatlearn.records import FloatStream, Sample

# A stream of a sample, at most T entries of any one shape: T - 1 numbers by prediction, or what is known of each token
# that goes in; None where the sample has no such stream.
ReadStream = Callable[[Sample], NDArray[Any] | None]


@dataclass(frozen=True)
class Column:
    """How one stream of a micro-batch is read from a sample: ``fill`` stands at positions the sample does not reach."""

    dtype: torch.dtype
    fill: float
    read: ReadStream


def stream(dtype: torch.dtype, fill: float, read: ReadStream) -> Any:
    """Declare a per-token stream of ``MicroBatch``; the whole of what is needed to add one.

    The result is a dataclass field, typed ``Any`` because it stands where a tensor's default would.
    """
    return field(metadata={"column": Column(dtype, fill, read)})


def after_first(values: NDArray[Any] | None) -> NDArray[Any] | None:
    """From by-token to by-prediction: token *i + 1* is what was guessed at position *i*."""
    return None if values is None else values[1:]


@dataclass(frozen=True, eq=False, kw_only=True)
class MicroBatch:
    """Whole sequences end to end, without padding, aligned by prediction; T is the sum of ``lengths``.

    ``labels`` is the next token of the same sequence. At the last position of a sequence ``loss_mask`` is False, the
    label is 0 and the numbers are 0. ``samples`` tells which of the packed samples each sequence is; it is empty for
    a filler, which is one token without loss and is there so that all ranks have the same number of micro-batches.

    ``routed_experts`` belongs to what goes in, as ``token_ids`` and ``position_ids`` do, and is not shifted: entry *i*
    names the experts of the token at position *i*, and is -1 where the engine told none.
    """

    token_ids: Tensor = stream(torch.int64, fill=0, read=lambda s: s.token_ids)  # [T]
    labels: Tensor = stream(torch.int64, fill=0, read=lambda s: s.token_ids[1:])  # [T]
    position_ids: Tensor = stream(torch.int64, fill=0, read=lambda s: np.arange(len(s.token_ids)))  # [T]
    loss_mask: Tensor = stream(torch.bool, fill=False, read=lambda s: s.loss_mask[1:])  # [T]
    advantages: Tensor = stream(torch.float32, fill=0.0, read=lambda s: s.advantages[1:])  # [T]
    rollout_logprobs: Tensor = stream(torch.float32, fill=0.0, read=lambda s: s.rollout_logprobs[1:])  # [T]
    old_logprobs: Tensor | None = stream(torch.float32, fill=0.0, read=lambda s: after_first(s.old_logprobs))  # [T]
    ref_logprobs: Tensor | None = stream(torch.float32, fill=0.0, read=lambda s: after_first(s.ref_logprobs))  # [T]
    routed_experts: Tensor | None = stream(torch.int16, fill=-1, read=lambda s: s.routed_experts)  # [T, L, K]
    lengths: tuple[int, ...]
    samples: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens that go through the model."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its streams on ``device``."""
        streams: dict[str, Tensor | None] = {name: vars(self)[name] for name in COLUMNS}
        moved: dict[str, Any] = {
            name: None if kept is None else to_device(kept, device) for name, kept in streams.items()
        }
        return replace(self, **moved)


COLUMNS: dict[str, Column] = {
    entry.name: entry.metadata["column"] for entry in fields(MicroBatch) if "column" in entry.metadata
}


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """What all ranks compute between two optimizer steps: ``ranks[r][m]`` is micro-batch *m* of data rank *r*.

    ``num_loss_tokens`` counts True in all loss masks of all ranks; every mean of the step divides by it.
    """

    ranks: tuple[tuple[MicroBatch, ...], ...]
    num_loss_tokens: int
    num_samples: int


def pack(samples: Sequence[Sample], layout: BatchLayout) -> TrainBatch:
    """Lay samples out in micro-batches for every data rank; see ``plan`` for who goes where."""
    assert samples, "a batch needs at least one sample"
    lengths = [len(sample.token_ids) for sample in samples]
    ranks = tuple(tuple(micro_batch(samples, members) for members in bins) for bins in plan(lengths, layout))
    num_loss_tokens = sum(int(np.count_nonzero(sample.loss_mask[1:])) for sample in samples)
    return TrainBatch(ranks=ranks, num_loss_tokens=num_loss_tokens, num_samples=len(samples))


def unpack(batch: TrainBatch, values: Sequence[Sequence[Tensor]]) -> list[FloatStream]:
    """From ``values[rank][micro]``, [T] by prediction, to one stream per sample by token, in the order packed.

    Token 0 of a sample was never guessed; its entry is zero.
    """
    streams: list[FloatStream] = [np.zeros(0, dtype=np.float32)] * batch.num_samples
    for rank_batches, rank_values in zip(batch.ranks, values, strict=True):
        for micro, tensor in zip(rank_batches, rank_values, strict=True):
            numbers = tensor.detach().to(device="cpu", dtype=torch.float32).numpy()
            assert numbers.shape == (micro.num_tokens,), f"{numbers.shape} values for {micro.num_tokens} tokens"
            ends = np.cumsum(micro.lengths)
            # A filler has a length but is no sample.
            for index, length, end in zip(micro.samples, micro.lengths, ends, strict=False):
                by_token = np.zeros(length, dtype=np.float32)
                by_token[1:] = numbers[end - length : end - 1]
                streams[index] = by_token
    return streams


def micro_batch(samples: Sequence[Sample], members: Sequence[int]) -> MicroBatch:
    """Put the sequences ``members`` end to end; none of them makes a filler."""
    chosen = [samples[index] for index in members] or [filler_like(samples[0])]
    lengths = tuple(len(sample.token_ids) for sample in chosen)
    # Any, because a record's fields differ in type: only streams that Sample declares optional can come back None.
    streams: dict[str, Any] = {name: concatenate(column, chosen, lengths) for name, column in COLUMNS.items()}
    return MicroBatch(**streams, lengths=lengths, samples=tuple(members))


def concatenate(column: Column, samples: Sequence[Sample], lengths: Sequence[int]) -> Tensor | None:
    """One column of a micro-batch, [T] or [T, ...] as its entries are; ``None`` where no sample has it."""
    parts = [column.read(sample) for sample in samples]
    present = [part for part in parts if part is not None]
    if not present:
        return None
    assert len(present) == len(parts), "either all samples of a batch have a stream or none has it"
    whole = torch.full((sum(lengths), *present[0].shape[1:]), column.fill, dtype=column.dtype)
    target = whole.numpy()
    start = 0
    for part, length in zip(present, lengths, strict=True):
        # Only what an engine tells of the tokens that went in may end early; a number is there for every guess.
        fewest = length - 1 if part.ndim == 1 else 0
        assert fewest <= len(part) <= length, f"a stream of {len(part)} entries for {length} tokens"
        target[start : start + len(part)] = part
        start += length
    return whole


def filler_like(sample: Sample) -> Sample:
    """A sample of one token without loss that has the same optional streams as ``sample``."""
    zero = np.zeros(1, dtype=np.float32)
    return Sample(
        prompt_uid="",
        token_ids=np.zeros(1, dtype=np.int32),
        loss_mask=np.zeros(1, dtype=np.bool_),
        rollout_logprobs=zero,
        advantages=zero,
        old_logprobs=None if sample.old_logprobs is None else zero,
        ref_logprobs=None if sample.ref_logprobs is None else zero,
        routed_experts=None if sample.routed_experts is None else sample.routed_experts[:0],
    )
