"""What every wire must do: each tensor arrives, equal bit for bit, under one version, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatlearn.errors import WeightTransferError
from chatlearn.weights.sender import build_sender
from chatlearn.weights.shared_memory import SharedMemorySender, read_bucket
from chatlearn.weights.wire import (
    BeginUpdate,
    EngineClient,
    FinishUpdate,
    OpenTransfer,
    TensorMeta,
    TransferMessage,
    UpdateWeights,
    WireMeeting,
)

# vLLM's own imports warn of torch's and Python's deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Weights:
    """A source of given tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def metadata(self) -> list[TensorMeta]:
        return [
            TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        ]

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()


class Receiver:
    """An ``EngineClient`` that is the engine too: it reads every bucket and keeps what it was told."""

    def __init__(self) -> None:
        self.messages: list[TransferMessage] = []
        self.arrived: dict[str, Tensor] = {}

    def send(self, message: TransferMessage) -> None:
        self.messages.append(message)
        if isinstance(message, UpdateWeights):
            self.arrived.update(read_bucket(message.info))


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def make_weights(shapes: list[list[int]], seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return Weights(
        {
            f"layer.{index}": torch.randn(shape, generator=generator).to(dtypes[(index + seed) % 3])
            for index, shape in enumerate(shapes)
        }
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=0, max_size=3), min_size=1, max_size=12),
    bucket_bytes=st.integers(1, 600),
    seed=st.integers(0, 99),
)
def test_every_tensor_arrives_bit_for_bit_whatever_the_buckets(
    shapes: list[list[int]], bucket_bytes: int, seed: int
) -> None:
    source, receiver = make_weights(shapes, seed), Receiver()
    stats = SharedMemorySender(source, receiver, rank=0, bucket_bytes=bucket_bytes).send(4)
    assert list(receiver.arrived) == list(source.tensors)
    for name, tensor in source.tensors.items():
        assert receiver.arrived[name].dtype == tensor.dtype
        assert receiver.arrived[name].shape == tensor.shape
        assert bits(receiver.arrived[name]) == bits(tensor)
    assert stats.num_bytes == sum(tensor.nbytes for tensor in source.tensors.values())
    assert receiver.messages[:2] == [OpenTransfer({}), BeginUpdate(4)]
    assert receiver.messages[-1] == FinishUpdate(4)


def test_a_bucket_is_never_larger_than_allowed_unless_one_tensor_is() -> None:
    source, receiver = Weights({f"w{i}": torch.randn(100) for i in range(10)} | {"large": torch.randn(900)}), Receiver()
    SharedMemorySender(source, receiver, rank=0, bucket_bytes=1000).send(1)
    sizes = {message.info["num_bytes"] for message in receiver.messages if isinstance(message, UpdateWeights)}
    assert sizes == {3648}  # 900 floats, up to the next cache line
    assert len([m for m in receiver.messages if isinstance(m, UpdateWeights)]) == 3  # eight, the other two, the large
    SharedMemorySender(source, receiver, rank=0).send(2)
    assert len([m for m in receiver.messages if isinstance(m, UpdateWeights)]) == 3 + 1


def test_slices_and_transposes_arrive_as_they_look() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    source, receiver = Weights({"transposed": base.T, "column": base[:, 2]}), Receiver()
    SharedMemorySender(source, receiver, rank=0).send(1)
    assert torch.equal(receiver.arrived["transposed"], base.T)
    assert torch.equal(receiver.arrived["column"], base[:, 2])


def test_other_ranks_take_part_in_the_export_and_say_nothing() -> None:
    source, receiver = make_weights([[2], [3]], 0), Receiver()
    walked: list[str] = []

    class Walked(Weights):
        def export_weights(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.tensors.items():
                walked.append(name)
                yield name, tensor

    stats = build_sender("shared_memory", Walked(source.tensors), receiver, rank=1).send(3)
    assert (walked, receiver.messages) == (list(source.tensors), [])
    assert (stats.version, stats.num_tensors) == (3, 2)


def test_a_source_that_exports_other_than_it_declared_is_stopped() -> None:
    class Lying(Weights):
        def metadata(self) -> list[TensorMeta]:
            return [TensorMeta("w", "float32", (3,))]

    with pytest.raises(WeightTransferError, match=r"declared TensorMeta\(name='w'.*\(3,\)\) and exported .*\(2,\)"):
        SharedMemorySender(Lying({"w": torch.zeros(2)}), Receiver(), rank=0).send(1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"host": "elsewhere"}, "must share one host"),
        ({"descriptor": 4000}, "cannot open the trainer's weights"),
        ({"checksums": [0]}, r"layer\.0: the bytes that arrived are not those that were sent"),
    ],
)
def test_what_cannot_be_trusted_is_refused(change: dict[str, Any], complaint: str) -> None:
    class Mangling:
        def send(self, message: TransferMessage) -> None:
            if isinstance(message, UpdateWeights):
                read_bucket({**message.info, **change})

    with pytest.raises(WeightTransferError, match=complaint):
        SharedMemorySender(make_weights([[5]], 0), Mangling(), rank=0).send(1)


def test_no_memory_outlives_a_transfer_that_fails() -> None:
    class Failing:
        def send(self, message: TransferMessage) -> None:
            if isinstance(message, UpdateWeights):
                raise WeightTransferError("the engine fell over")

    def open_files() -> set[str]:
        return {file.name for file in Path("/proc/self/fd").iterdir()}

    sender = SharedMemorySender(make_weights([[50]] * 5, 0), Failing(), rank=0, bucket_bytes=100)
    before = open_files()
    with pytest.raises(WeightTransferError, match="fell over"):
        sender.send(1)
    assert open_files() == before


class PipeClient:
    """An ``EngineClient`` to an engine in another process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, message: TransferMessage) -> None:
        self._pipe.send(message)
        self._pipe.recv()


def send_through(pipe: Connection) -> None:
    SharedMemorySender(make_weights([[40], [30, 2]], 7), PipeClient(pipe), rank=0, bucket_bytes=100).send(9)


def test_weights_cross_processes_and_vanish_with_a_killed_sender() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    sender = context.Process(target=send_through, args=(theirs,))
    sender.start()
    arrived: dict[str, Tensor] = {}
    bucket: UpdateWeights | None = None
    while len(arrived) < 2:
        message = ours.recv()
        if isinstance(message, UpdateWeights):
            bucket = message
            arrived.update(read_bucket(message.info))
        if len(arrived) < 2:
            ours.send("done")
    expected = make_weights([[40], [30, 2]], 7).tensors
    assert all(bits(arrived[name]) == bits(tensor) for name, tensor in expected.items())

    # The sender waits for an answer, with its memory open, and is killed there.
    assert sender.pid is not None
    os.kill(sender.pid, signal.SIGKILL)
    sender.join()
    assert bucket is not None
    with pytest.raises(WeightTransferError, match="cannot open"):
        read_bucket(bucket.info)


# The wires between GPUs need GPUs to carry anything. What can be held to vLLM's word here is how we speak with it.


def open_with_loopback(monkeypatch: pytest.MonkeyPatch, build: Callable[[EngineClient], Any]) -> Any:
    """Build a sender whose vLLM engine, in place of one that needs a GPU, makes the calls that vLLM's make."""
    from vllm.distributed.weight_transfer import TrainerWeightTransferEngine, WeightTransferTrainerFactory

    class Loopback(TrainerWeightTransferEngine[Any]):
        @classmethod
        def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Loopback:
            engine = cls(client=client, source=source, is_sender=init_info.is_sender)
            engine.init_info = init_info
            engine.client.init_weight_transfer_engine({"rank_offset": 1})
            return engine

        def send_weights(self) -> None:
            assert self.source is not None
            pairs = list(self.source)
            declared = [(meta.name, meta.dtype, meta.shape) for meta in self.source.metadata()]
            assert declared == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs]
            self.client.start_weight_update()
            names, shapes = [name for name, _ in pairs], [list(tensor.shape) for _, tensor in pairs]
            self.client.update_weights({"names": names, "shapes": shapes})
            self.client.finish_weight_update()

    opened: list[Any] = []

    def trainer_init(init_info: Any, *, client: Any, source: Any = None) -> Any:
        opened.append(init_info)
        return Loopback.trainer_init(init_info, client=client, source=source)

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    messages: list[TransferMessage] = []

    class Recording:
        def send(self, message: TransferMessage) -> None:
            messages.append(message)

    sender = build(Recording())
    assert sender.send(6).num_tensors == 2
    assert messages == [
        OpenTransfer({"rank_offset": 1}),
        BeginUpdate(6),
        UpdateWeights({"names": ["layer.0", "layer.1"], "shapes": [[2], [3, 1]]}),
        FinishUpdate(6),
    ]
    sender.close()
    return opened[0]


def test_our_client_and_source_are_what_vllm_asks_for() -> None:
    from vllm.distributed.weight_transfer import VLLMWeightSyncClient, WeightSource

    from chatlearn.weights.vllm_transfer import MessageClient, as_vllm_source

    source = make_weights([[2], [3, 1]], 0)
    assert isinstance(MessageClient(Receiver()), VLLMWeightSyncClient)
    adapter = as_vllm_source(source)
    assert isinstance(adapter, WeightSource)
    assert [name for group, _ in adapter.iter_groups() for name in group] == list(source.tensors)


def test_ipc_is_opened_packed_with_room_for_the_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_weights([[2], [3, 1]], 0)
    info = open_with_loopback(monkeypatch, lambda client: build_sender("ipc", source, client, rank=0))
    assert (info.backend, info.packed, info.is_sender) == ("ipc", True, True)
    assert info.packed_buffer_size_bytes >= 6


def test_nccl_is_opened_with_all_engine_ranks_behind_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_weights([[2], [3, 1]], 0)
    meeting = WireMeeting("127.0.0.1", 29500, num_engine_ranks=6)
    info = open_with_loopback(monkeypatch, lambda client: build_sender("nccl", source, client, 0, meeting))
    assert (info.backend, info.master_address, info.master_port, info.world_size) == ("nccl", "127.0.0.1", 29500, 7)


@pytest.mark.parametrize("wire", ["ipc", "nccl"])
def test_vllms_messages_name_their_tensors_as_the_ledger_reads_them(wire: str) -> None:
    from dataclasses import fields

    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    update_info = {"ipc": IPCWeightTransferUpdateInfo, "nccl": NCCLWeightTransferUpdateInfo}[wire]
    assert {"names", "shapes"} <= {field.name for field in fields(cast("Any", update_info))}
