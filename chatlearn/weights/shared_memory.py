"""The wire between processes of one machine: buckets of tensors in memory that both ends map. Both ends are here.

The sender fills one anonymous memory file (``memfd``) again and again; an engine opens it through the sender's
``/proc/<pid>/fd``, checks every tensor's CRC, and copies it out before it answers. The memory has no name in a file
system: nothing is left behind when a process is killed, and a small ``/dev/shm``, as containers have, does not matter.
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from chatlearn.errors import WeightTransferError
from chatlearn.weights.wire import (
    BeginUpdate,
    EngineClient,
    FinishUpdate,
    OpenTransfer,
    TensorMeta,
    TransferStats,
    UpdateWeights,
    WeightSource,
)

# A quarter of a gibibyte is copied in 25 ms on one core and is small beside any model that needs more than one bucket.
DEFAULT_BUCKET_BYTES = 256 * 2**20

# Tensors start at cache lines: enough for every dtype, and what torch's own allocator gives.
ALIGNMENT_BYTES = 64

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Bucket:
    """Some tensors of an update and where they lie: what ``UpdateWeights.info`` of this wire holds."""

    host: str
    pid: int
    descriptor: int
    num_bytes: int
    names: list[str] = field(default_factory=list[str])
    dtype_names: list[str] = field(default_factory=list[str])
    shapes: list[list[int]] = field(default_factory=list[list[int]])
    offsets: list[int] = field(default_factory=list[int])
    checksums: list[int] = field(default_factory=list[int])


class SharedMemorySender:
    """The trainer's end: rank 0 writes, the other ranks take part in the export."""

    def __init__(
        self, source: WeightSource, client: EngineClient, rank: int, bucket_bytes: int = DEFAULT_BUCKET_BYTES
    ) -> None:
        self._source = source
        self._client = client
        self._rank = rank
        self._bucket_bytes = bucket_bytes
        if rank == 0:
            client.send(OpenTransfer({}))

    def send(self, version: int) -> TransferStats:
        """Carry all weights to the engines and call them ``version``; a collective over the trainer's ranks."""
        started = time.perf_counter()
        expected = self._source.metadata()
        if self._rank == 0:
            self._client.send(BeginUpdate(version))
            with Segment(segment_bytes(expected, self._bucket_bytes)) as segment:
                for bucket in fill_buckets(segment, in_declared_order(self._source, expected)):
                    self._client.send(UpdateWeights(asdict(bucket)))
            self._client.send(FinishUpdate(version))
        else:
            for _ in self._source.export_weights():
                pass
        num_bytes = sum(tensor_bytes(meta) for meta in expected)
        return TransferStats(version, len(expected), num_bytes, time.perf_counter() - started)

    def close(self) -> None:
        """Nothing outlives ``send``."""


def in_declared_order(source: WeightSource, expected: list[TensorMeta]) -> Iterator[tuple[str, Tensor]]:
    """Export, holding the source to what its ``metadata`` said; segment sizes were computed from that."""
    exported = source.export_weights()
    for meta, (name, tensor) in zip(expected, exported, strict=True):
        found = TensorMeta(name, dtype_name(tensor), tuple(tensor.shape))
        if found != meta:
            raise WeightTransferError(f"the trainer declared {meta} and exported {found}; both must agree, in order")
        yield name, tensor


class Segment:
    """Anonymous memory of a fixed size that other processes can open while it is held; use it in a ``with``."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def __enter__(self) -> Segment:
        self.descriptor = os.memfd_create("chatlearn-weights", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, self.num_bytes)
        self.memory = mmap.mmap(self.descriptor, self.num_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.memory.close()
        os.close(self.descriptor)

    def open_bucket(self) -> Bucket:
        """Begin again at the start of the memory."""
        return Bucket(socket.gethostname(), os.getpid(), self.descriptor, self.num_bytes)

    def write(self, bucket: Bucket, offset: int, name: str, tensor: Tensor) -> None:
        """Copy ``tensor`` to ``offset`` and enter it into ``bucket``."""
        content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        self.memory[offset : offset + content.nbytes] = content.data
        bucket.names.append(name)
        bucket.dtype_names.append(dtype_name(tensor))
        bucket.shapes.append(list(tensor.shape))
        bucket.offsets.append(offset)
        bucket.checksums.append(zlib.crc32(content.data))


def fill_buckets(segment: Segment, pairs: Iterator[tuple[str, Tensor]]) -> Iterator[Bucket]:
    """Put tensors into the segment until it is full, yield, and begin again once the caller comes back."""
    bucket, offset = segment.open_bucket(), 0
    for name, tensor in pairs:
        if bucket.names and offset + tensor.nbytes > segment.num_bytes:
            yield bucket
            bucket, offset = segment.open_bucket(), 0
        segment.write(bucket, offset, name, tensor)
        offset = aligned(offset + tensor.nbytes)
    if bucket.names:
        yield bucket


def read_bucket(info: Mapping[str, Any] | Bucket) -> list[tuple[str, Tensor]]:
    """The engine's end: copies of a bucket's tensors, each proven equal to what the sender wrote.

    Raises ``WeightTransferError`` where the memory cannot be opened or a tensor's checksum differs.
    """
    bucket = info if isinstance(info, Bucket) else Bucket(**info)
    if bucket.host != socket.gethostname():
        raise WeightTransferError(
            f"weights lie in the memory of host {bucket.host!r} and this engine runs on {socket.gethostname()!r}; "
            "on the CPU, trainer and engines must share one host"
        )
    path = Path(f"/proc/{bucket.pid}/fd/{bucket.descriptor}")
    try:
        with path.open("rb") as file:
            # A private writable map: torch warns of read-only memory, and nobody writes to it.
            memory = mmap.mmap(file.fileno(), bucket.num_bytes, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise WeightTransferError(f"cannot open the trainer's weights at {path}: {error}") from error
    with memory:
        return [read_tensor(bucket, index, memory) for index in range(len(bucket.names))]


def read_tensor(bucket: Bucket, index: int, memory: mmap.mmap) -> tuple[str, Tensor]:
    """Copy one tensor out and check the copy: the engine keeps it until its layer is complete."""
    name, shape, offset = bucket.names[index], bucket.shapes[index], bucket.offsets[index]
    num_bytes = math.prod(shape) * DTYPES[bucket.dtype_names[index]].itemsize
    content = bytearray(memory[offset : offset + num_bytes])
    if zlib.crc32(content) != bucket.checksums[index]:
        raise WeightTransferError(f"{name}: the bytes that arrived are not those that were sent (checksum differs)")
    return name, torch.frombuffer(content, dtype=DTYPES[bucket.dtype_names[index]]).reshape(shape)


def segment_bytes(expected: list[TensorMeta], bucket_bytes: int) -> int:
    """At most a bucket, never less than the largest tensor, never more than all of them."""
    sizes = [aligned(tensor_bytes(meta)) for meta in expected]
    return max(1, max(sizes, default=0), min(sum(sizes), bucket_bytes))


def tensor_bytes(meta: TensorMeta) -> int:
    """Bytes of a tensor on the wire."""
    return math.prod(meta.shape) * DTYPES[meta.dtype].itemsize


def dtype_name(tensor: Tensor) -> str:
    """``float32`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def aligned(offset: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
