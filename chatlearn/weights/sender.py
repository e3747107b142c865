"""Opens the trainer's end of a wire by its name."""

from __future__ import annotations

from chatlearn.weights.shared_memory import SharedMemorySender
from chatlearn.weights.vllm_transfer import open_ipc_sender, open_nccl_sender
from chatlearn.weights.wire import EngineClient, WeightSender, WeightSource, WireKind, WireMeeting


def build_sender(
    kind: WireKind,
    source: WeightSource,
    client: EngineClient,
    rank: int,
    meeting: WireMeeting | None = None,
) -> WeightSender:
    """Open the trainer's end of the wire, in every trainer rank; ``meeting`` is for ``nccl`` alone."""
    if kind == "shared_memory":
        return SharedMemorySender(source, client, rank)
    if kind == "ipc":
        return open_ipc_sender(source, client, rank)
    assert meeting is not None, "the nccl wire needs a meeting"
    return open_nccl_sender(source, client, rank, meeting)
