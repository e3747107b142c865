"""The wires between GPUs: vLLM's own trainer engines, driven through our messages.

``ipc`` hands memory handles to engines on the same GPUs; ``nccl`` broadcasts to engines elsewhere. vLLM's worker
engines are the other end, so this file only translates: our source into theirs, their four calls into our messages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from chatlearn.errors import WeightTransferError
from chatlearn.weights.shared_memory import DTYPES, tensor_bytes
from chatlearn.weights.wire import (
    BeginUpdate,
    EngineClient,
    FinishUpdate,
    OpenTransfer,
    TransferStats,
    UpdateWeights,
    WeightSource,
    WireMeeting,
)

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine


class MessageClient:
    """vLLM's control plane (``VLLMWeightSyncClient``) spoken as our messages; ``version`` labels the running update."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._client.send(OpenTransfer(init_info))

    def start_weight_update(self) -> None:
        self._client.send(BeginUpdate(self.version))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        # A list would be one entry per worker of data-parallel engines; ipc and nccl send one for all.
        if isinstance(update_info, list):
            raise WeightTransferError("this wire sends one update for all workers and was handed a list")
        self._client.send(UpdateWeights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        del weight_version  # vLLM's trainer engines leave it out; ours travels in the message
        self._client.send(FinishUpdate(self.version))


class VllmSender:
    """A ``WeightSender`` around one of vLLM's trainer engines."""

    def __init__(self, source: WeightSource, client: EngineClient, init_info: TrainerInitInfo) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        self._source = source
        self._client = MessageClient(client)
        self._engine: TrainerWeightTransferEngine[Any] = WeightTransferTrainerFactory.trainer_init(
            init_info, client=self._client, source=as_vllm_source(source)
        )

    def send(self, version: int) -> TransferStats:
        """Carry all weights to the engines and call them ``version``; a collective over the trainer's ranks."""
        started = time.perf_counter()
        self._client.version = version
        self._engine.send_weights()
        sent = self._source.metadata()
        num_bytes = sum(tensor_bytes(meta) for meta in sent)
        return TransferStats(version, len(sent), num_bytes, time.perf_counter() - started)

    def close(self) -> None:
        """Leave the communicator, where there is one."""
        self._engine.shutdown()


def open_ipc_sender(source: WeightSource, client: EngineClient, rank: int) -> VllmSender:
    """For trainer and engines on the same GPUs; packed, so that extra memory is one buffer and not the model."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    largest = max(tensor_bytes(meta) for meta in source.metadata())
    init_info = IPCTrainerInitInfo(rank=rank, packed=True)
    # A tensor that is larger than the buffer cannot be packed.
    init_info.packed_buffer_size_bytes = max(init_info.packed_buffer_size_bytes, largest)
    return VllmSender(source, client, init_info)


def open_nccl_sender(source: WeightSource, client: EngineClient, rank: int, meeting: WireMeeting) -> VllmSender:
    """For engines on GPUs of their own: trainer rank 0 is rank 0 of the group, the engines' ranks follow."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    init_info = NCCLTrainerInitInfo(
        rank=rank,
        master_address=meeting.address,
        master_port=meeting.port,
        world_size=1 + meeting.num_engine_ranks,
    )
    return VllmSender(source, client, init_info)


def as_vllm_source(source: WeightSource) -> Any:
    """Our source as vLLM's abstract class, which can only be named where vLLM is installed (hence ``Any``)."""
    from vllm.distributed.weight_transfer.base import ParamMeta
    from vllm.distributed.weight_transfer.base import WeightSource as VllmWeightSource

    class Adapter(VllmWeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(meta.name, DTYPES[meta.dtype], meta.shape) for meta in source.metadata()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return source.export_weights()

    return Adapter()
