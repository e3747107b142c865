"""The wire between processes that share GPUs: each bucket lies on every GPU where an engine's worker is. Both ends.

Every trainer rank packs the bucket on its own GPU, where the gathered parameters are anyway, and the worker on that GPU
copies it there: nothing crosses from one to the other. All ranks hold equal bytes, so rank 0's checksums are those of
each; a GPU that disagrees is found by its worker. vLLM has a wire of this kind (``ipc``); this one is ours because that
one sends no checksums, and hands Python's pickled constructors to whoever loads the weights.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chatlearn import device
from chatlearn.device import DeviceMemory
from chatlearn.errors import WeightTransferError
from chatlearn.weights.bucket import Bucket
from chatlearn.weights.wire import EngineClient, UpdateWeights


class DeviceMemoryCarrier:
    """Lends memory of its own GPU to every rank of the trainer, for one update."""

    def __init__(self, client: EngineClient, rank: int, memory_device: torch.device) -> None:
        self._client = client
        self._rank = rank
        self._device = memory_device

    @contextmanager
    def lend(self, num_bytes: int) -> Generator[DeviceMemoryLoan]:
        """Memory on the GPU, and where every other rank's is; a collective over the trainer's ranks."""
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        loan = DeviceMemoryLoan(self._client, self._rank, memory)
        del memory
        yield loan
        told_to_all(None)  # rank 0 comes here when all engines have let go of the memory
        loan.memory = None
        device.reclaim_shared_memory(self._device)

    def close(self) -> None:
        """Nothing outlives ``lend``."""


class DeviceMemoryLoan:
    """One piece of memory on each GPU, shared once for a whole update."""

    def __init__(self, client: EngineClient, rank: int, memory: Tensor) -> None:
        self.memory: Tensor | None = memory
        self._client = client
        self._rank = rank
        everyones = told_to_all(asdict(device.share_memory(memory)))
        self._place = {shared["unit"]: shared for shared in everyones}

    def deliver(self, bucket: Bucket) -> None:
        """Rank 0 tells the engines; no rank fills its memory again before all have their copies."""
        told_to_all(None)  # every rank has packed: a packer waits for its device before it sums up
        if self._rank == 0:
            self._client.send(UpdateWeights(replace(bucket, place=self._place).message()))
        told_to_all(None)


class DeviceMemoryReceiver:
    """The end of one worker: it opens the memory on its own GPU once for an update, and lets go of it at the end."""

    def __init__(self, memory_device: torch.device) -> None:
        self._device = memory_device
        self._opened: tuple[DeviceMemory, Tensor] | None = None

    def copy_of(self, bucket: Bucket) -> Tensor:
        """Raises ``WeightTransferError`` where no rank of the trainer is on this GPU."""
        unit = device.unit_of(self._device)
        if unit not in bucket.place:
            raise WeightTransferError(
                f"the weights lie on {', '.join(bucket.place)} and this engine's worker is on {unit}; engines that "
                "share GPUs with the trainer need a trainer rank on each of theirs"
            )
        shared = DeviceMemory(**bucket.place[unit])
        if self._opened is None or self._opened[0] != shared:
            self._opened = (shared, device.open_memory(shared, self._device))
        return bucket.of(self._opened[1]).clone()

    def release(self) -> None:
        """Torch counts who has the memory open; the trainer can free it after this."""
        self._opened = None

    def close(self) -> None:
        """As after an update."""
        self.release()


def told_to_all(value: Any) -> list[Any]:
    """What each rank of the trainer says, in their order; returns when all have said it.

    It goes over the host, so it does not meet the gathering of weights, which goes on meanwhile over NCCL.
    """
    if not dist.is_initialized():
        return [value]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said
