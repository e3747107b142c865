"""Tensors end to end in one piece of memory: packed and summed up by the trainer, checked and unpacked by an engine.

Both ends work on whatever device the memory is on, and know nothing of how it gets from one to the other; that is what
the carriers do. A bucket is checked after an engine has copied it, so the numbers prove the bytes that are loaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from chatlearn import device
from chatlearn.errors import WeightTransferError
from chatlearn.weights.checksum import BLOCK_BYTES, checksums, num_whole_blocks
from chatlearn.weights.wire import TensorMeta

# On a GPU a quarter of a gibibyte is copied in a tenth of a millisecond, which is what a message takes; and it is small
# beside any model that needs more than one bucket.
DEFAULT_BUCKET_BYTES = 256 * 2**20

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Bucket:
    """Some tensors of an update: what ``UpdateWeights.info`` holds, as plain values, on each of our wires.

    ``place`` says where the memory is, in the carrier's own words; the bucket is the ``num_bytes`` from ``start`` on,
    and ``offsets`` count from there. ``checksums`` are those of the bytes that are sent.
    """

    start: int
    num_bytes: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    checksums: list[int]
    place: Mapping[str, Any]

    def borders(self) -> list[tuple[int, int]]:
        """Where each tensor begins and ends, in bytes."""
        return [
            (offset, offset + math.prod(shape) * DTYPES[name].itemsize)
            for offset, shape, name in zip(self.offsets, self.shapes, self.dtype_names, strict=True)
        ]

    def of(self, memory: Tensor) -> Tensor:
        """The bucket in the memory it lies in."""
        return memory[self.start : self.start + self.num_bytes]

    def message(self) -> dict[str, Any]:
        """As ``UpdateWeights.info``."""
        return asdict(self)


@dataclass(frozen=True)
class _Run:
    """Bytes that lie end to end both in a source's memory and in the bucket, to be copied at once."""

    source: Tensor
    start: int
    num_bytes: int
    offset: int

    def follows(self, other: _Run) -> bool:
        """Whether this one begins where ``other`` ends, on both sides."""
        return (
            self.source.untyped_storage().data_ptr() == other.source.untyped_storage().data_ptr()
            and self.start == other.start + other.num_bytes
            and self.offset == other.offset + other.num_bytes
        )

    def content(self) -> Tensor:
        """The bytes, as a view of the source's memory."""
        content = torch.empty(0, dtype=torch.uint8, device=self.source.device)
        return content.set_(self.source.untyped_storage(), self.start, (self.num_bytes,), (1,))


@dataclass(frozen=True)
class PackingPlan:
    """How memory is used: in equal parts that take turns, each for ``bucket_bytes``, or for one tensor above that."""

    bucket_bytes: int
    part_bytes: int
    num_parts: int

    @staticmethod
    def of(expected: list[TensorMeta], bucket_bytes: int) -> PackingPlan:
        """For these tensors; where one bucket holds all of them, one part is enough."""
        sizes = [num_whole_blocks(tensor_bytes(meta)) * BLOCK_BYTES for meta in expected]
        bucket = max(BLOCK_BYTES, min(sum(sizes), num_whole_blocks(bucket_bytes) * BLOCK_BYTES))
        return PackingPlan(bucket, max(bucket, *sizes), num_parts=1 if sum(sizes) <= bucket else 2)

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        return self.num_parts * self.part_bytes


class Packer:
    """Fills ``memory`` with tensors, bucket after bucket, part after part.

    Whoever takes a bucket may use it while the next one is packed. ``checksum_s`` counts the seconds that went into
    checksums.
    """

    def __init__(self, memory: Tensor, plan: PackingPlan) -> None:
        self._parts = memory.split(plan.part_bytes)
        self._bucket_bytes = plan.bucket_bytes
        self._turn = 0
        self.checksum_s = 0.0
        self._begin()

    def buckets(self, pairs: Iterator[tuple[str, Tensor]]) -> Iterator[Bucket]:
        """All of ``pairs``, in their order; each must fit into the memory."""
        for name, tensor in pairs:
            if self._metas and self._end + tensor.nbytes > self._bucket_bytes:
                yield self._sealed()
                self._turn += 1
                self._begin()
            self._add(name, tensor)
        if self._metas:
            yield self._sealed()
            self._begin()

    def _begin(self) -> None:
        self._memory = self._parts[self._turn % len(self._parts)]
        self._metas: list[TensorMeta] = []
        self._offsets: list[int] = []
        self._end = 0
        self._run: _Run | None = None

    def _add(self, name: str, tensor: Tensor) -> None:
        """Note a tensor; it is copied later, together with those that follow it in its own memory too.

        So the experts of a layer, which are exported as slices of one tensor, are copied in bulk.
        """
        plain = tensor.detach().contiguous()
        run = _Run(plain, int(plain.storage_offset()) * plain.itemsize, plain.nbytes, self._end)
        if self._run is not None and run.follows(self._run):
            self._run = _Run(self._run.source, self._run.start, self._run.num_bytes + run.num_bytes, self._run.offset)
        else:
            self._copy_run()
            self._run = run
        self._metas.append(meta_of(name, tensor))
        self._offsets.append(self._end)
        self._end += num_whole_blocks(plain.nbytes) * BLOCK_BYTES

    def _copy_run(self) -> None:
        if self._run is not None:
            self._memory[self._run.offset : self._run.offset + self._run.num_bytes].copy_(self._run.content())
            self._run = None  # the parameter need not stay gathered

    def _sealed(self) -> Bucket:
        """What was noted, copied and summed up."""
        self._copy_run()
        ends = (offset + tensor_bytes(meta) for offset, meta in zip(self._offsets, self._metas, strict=True))
        borders = list(zip(self._offsets, ends, strict=True))
        device.wait_for(self._memory.device)  # or else the copies would be counted as checksums
        started = time.perf_counter()
        sums = checksums(self._memory, borders)
        self.checksum_s += time.perf_counter() - started
        return Bucket(
            start=self._turn % len(self._parts) * self._memory.nbytes,
            num_bytes=self._end,
            names=[meta.name for meta in self._metas],
            dtype_names=[meta.dtype for meta in self._metas],
            shapes=[list(meta.shape) for meta in self._metas],
            offsets=self._offsets,
            checksums=sums,
            place={},
        )


def unpacked(bucket: Bucket, memory: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors of a bucket, as views of an engine's own copy of it, proven to be those that were sent.

    Raises ``WeightTransferError`` naming the first tensor that differs.
    """
    borders = bucket.borders()
    found = checksums(memory, borders)
    differing = [
        name for name, sent, arrived in zip(bucket.names, bucket.checksums, found, strict=True) if sent != arrived
    ]
    if differing:
        more = f", and so do {len(differing) - 1} more of {len(found)}" if len(differing) > 1 else ""
        raise WeightTransferError(
            f"{differing[0]}: the bytes that arrived are not those that were sent (its checksum differs{more})"
        )
    return [
        (name, memory[start:end].view(DTYPES[dtype]).view(shape))
        for name, dtype, shape, (start, end) in zip(
            bucket.names, bucket.dtype_names, bucket.shapes, borders, strict=True
        )
    ]


def tensor_bytes(meta: TensorMeta) -> int:
    """Bytes of a tensor on the wire."""
    return math.prod(meta.shape) * DTYPES[meta.dtype].itemsize


def meta_of(name: str, tensor: Tensor) -> TensorMeta:
    """What is declared of a tensor: ``float32`` for ``torch.float32``."""
    return TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
