"""The wire to engines on GPUs of their own: each bucket is broadcast by the trainer's rank 0 over NCCL. Both ends.

Meeting and communicator are vLLM's own; only what travels is ours, since vLLM's ``nccl`` wire sends no checksums.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from chatlearn import device
from chatlearn.weights.bucket import Bucket
from chatlearn.weights.wire import EngineClient, OpenTransfer, UpdateWeights, WireMeeting


class Communicator(Protocol):
    """What we use of vLLM's ``PyNcclCommunicator``."""

    def broadcast(self, tensor: Tensor, src: int) -> None: ...

    def destroy(self) -> None: ...


class BroadcastCarrier:
    """Lends memory to rank 0, which is also rank 0 of ``group``; on the other ranks there is no group."""

    def __init__(self, client: EngineClient, group: Communicator | None, memory_device: torch.device) -> None:
        self._client = client
        self._group = group
        self._device = memory_device

    @contextmanager
    def lend(self, num_bytes: int) -> Generator[BroadcastLoan]:
        """Plain memory of the device; engines get copies."""
        if self._group is None:
            yield BroadcastLoan(self._client, None, None)
            return
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        yield BroadcastLoan(self._client, self._group, memory)

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.destroy()


class BroadcastLoan:
    """Memory, and the group that it is broadcast in."""

    def __init__(self, client: EngineClient, group: Communicator | None, memory: Tensor | None) -> None:
        self._client = client
        self._group = group
        self.memory = memory

    def deliver(self, bucket: Bucket) -> None:
        """Tell the engines and broadcast at once: they join the broadcast while they act on the message."""
        assert self._group is not None, "only rank 0 packs"
        assert self.memory is not None, "only rank 0 packs"
        teller = ThreadPoolExecutor(max_workers=1)
        try:
            told = teller.submit(self._client.send, UpdateWeights(bucket.message()))
            self._group.broadcast(bucket.of(self.memory), src=0)
            told.result()
        finally:
            # An engine that failed elsewhere may never answer; then the error is worth more than the thread.
            teller.shutdown(wait=False)
        device.wait_for(self.memory.device)


class BroadcastReceiver:
    """The end of one worker."""

    def __init__(self, group: Communicator, memory_device: torch.device) -> None:
        self._group = group
        self._device = memory_device

    def copy_of(self, bucket: Bucket) -> Tensor:
        """Take part in the broadcast."""
        memory = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._device)
        self._group.broadcast(memory, src=0)
        device.wait_for(self._device)  # the group may use another stream than we do
        return memory

    def release(self) -> None:
        """The group lasts for all updates."""

    def close(self) -> None:
        """Leave the group."""
        self._group.destroy()


def join_trainers_group(meeting: WireMeeting, client: EngineClient) -> Communicator:
    """Meet all workers of all engines, as rank 0. vLLM counts a worker's rank from its engine's ``rank_offset``."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    info = {"master_address": meeting.address, "master_port": meeting.port, "world_size": 1 + meeting.num_engine_ranks}
    # Those who meet wait for each other, so the engines must be told while we are on our way.
    with ThreadPoolExecutor(max_workers=1) as teller:
        told = teller.submit(client.send, OpenTransfer({**info, "rank_offset": 1}))
        group = trainer_init(info)
        told.result()
    return group


def join_as_worker(info: Mapping[str, Any], parallel_config: Any) -> Communicator:
    """The other end of ``join_trainers_group``, in an engine's worker."""
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_process_group

    return worker_init_process_group(NCCLWeightTransferInitInfo(**info), parallel_config)
