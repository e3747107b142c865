"""Opens the trainer's end of a wire by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlearn.weights.broadcast import BroadcastCarrier, join_trainers_group
from chatlearn.weights.device_memory import DeviceMemoryCarrier
from chatlearn.weights.send import BucketSender
from chatlearn.weights.shared_memory import SharedMemorySender
from chatlearn.weights.wire import EngineClient, WeightSender, WeightSource, WireKind, WireMeeting

if TYPE_CHECKING:
    import torch


def build_sender(
    kind: WireKind,
    source: WeightSource,
    client: EngineClient,
    rank: int,
    memory_device: torch.device,
    meeting: WireMeeting | None = None,
) -> WeightSender:
    """Open the trainer's end of the wire, in every trainer rank.

    ``memory_device`` is where this rank's gathered weights are; ``meeting`` is for ``nccl`` alone.
    """
    if kind == "shared_memory":
        return SharedMemorySender(source, client, rank)
    if kind == "ipc":
        sender = BucketSender(source, client, rank, DeviceMemoryCarrier(client, rank, memory_device))
        sender.open({})
        return sender
    assert meeting is not None, "the nccl wire needs a meeting"
    group = join_trainers_group(meeting, client) if rank == 0 else None
    return BucketSender(source, client, rank, BroadcastCarrier(client, group, memory_device))
