"""The wire between processes of one machine: buckets of tensors in memory that both ends map. Both ends are here.

The sender fills one anonymous memory file (``memfd``) again and again; an engine maps it through the sender's
``/proc/<pid>/fd`` and copies it out before it answers. The memory has no name in a file system: nothing is left behind
when a process is killed, and a small ``/dev/shm``, as containers have, does not matter.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatlearn.errors import WeightTransferError
from chatlearn.weights.bucket import Bucket, unpacked
from chatlearn.weights.send import BucketSender
from chatlearn.weights.wire import EngineClient, TransferStats, UpdateWeights, WeightSource

# An engine's copy of a larger bucket is memory that comes fresh from the system each time, and touching that costs more
# than the copy: with 256 MiB a transfer takes twice as long. A much smaller bucket is not worth a message.
BUCKET_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Segment:
    """Where the memory is: a descriptor of a process of a host."""

    host: str
    pid: int
    descriptor: int
    num_bytes: int

    @property
    def path(self) -> Path:
        """The file to map."""
        return Path(f"/proc/{self.pid}/fd/{self.descriptor}")


class SharedMemorySender:
    """The trainer's end: rank 0 writes, the other ranks take part in the export."""

    def __init__(self, source: WeightSource, client: EngineClient, rank: int, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._sender = BucketSender(source, client, rank, SharedMemoryCarrier(client, rank), bucket_bytes)
        self._sender.open({})

    def send(self, version: int) -> TransferStats:
        """Carry all weights to the engines and call them ``version``; a collective over the trainer's ranks."""
        return self._sender.send(version)

    def close(self) -> None:
        """Nothing outlives ``send``."""


class SharedMemoryCarrier:
    """Lends memory to rank 0; there is nothing to keep between updates."""

    def __init__(self, client: EngineClient, rank: int) -> None:
        self._client = client
        self._rank = rank

    @contextmanager
    def lend(self, num_bytes: int) -> Generator[SharedMemoryLoan]:
        """Anonymous memory that other processes can map for as long as the block lasts."""
        if self._rank != 0:
            yield SharedMemoryLoan(self._client, None, None)
            return
        descriptor = os.memfd_create("chatlearn-weights", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, num_bytes)
            segment = Segment(socket.gethostname(), os.getpid(), descriptor, num_bytes)
            memory = torch.from_file(str(segment.path), shared=True, size=num_bytes, dtype=torch.uint8)
            yield SharedMemoryLoan(self._client, segment, memory)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nothing outlives ``lend``."""


@dataclass(frozen=True)
class SharedMemoryLoan:
    """A segment that is mapped."""

    client: EngineClient
    segment: Segment | None
    memory: Tensor | None

    def deliver(self, bucket: Bucket) -> None:
        """Tell the engines where the bucket is."""
        assert self.segment is not None, "only rank 0 packs"
        self.client.send(UpdateWeights(replace(bucket, place=asdict(self.segment)).message()))


class SharedMemoryReceiver:
    """The engine's end: it maps the sender's memory for as long as it takes to copy it."""

    def copy_of(self, bucket: Bucket) -> Tensor:
        """Raises ``WeightTransferError`` where the memory cannot be opened."""
        segment = Segment(**bucket.place)
        if segment.host != socket.gethostname():
            raise WeightTransferError(
                f"weights lie in the memory of host {segment.host!r} and this engine runs on "
                f"{socket.gethostname()!r}; on the CPU, trainer and engines must share one host"
            )
        try:
            memory = torch.from_file(str(segment.path), shared=False, size=segment.num_bytes, dtype=torch.uint8)
        except RuntimeError as error:  # of whatever kind, from the system's calls
            raise WeightTransferError(f"cannot open the trainer's weights at {segment.path}: {error}") from error
        return bucket.of(memory).clone()

    def release(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is kept."""


def read_bucket(info: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Copies of the tensors of one ``UpdateWeights`` of this wire, each proven equal to what the sender wrote."""
    bucket = Bucket(**info)
    return unpacked(bucket, SharedMemoryReceiver().copy_of(bucket))
