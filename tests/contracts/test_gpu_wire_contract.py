"""The wires between GPUs need GPUs to carry anything. What can be held to its word here is how they use torch and vLLM,
and that with memory of the host in place of the device's the protocol is kept."""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, get_args

import pytest
import torch
from test_wire_contract import Weights, bits, make_weights
from torch import Tensor

from chatlearn import device
from chatlearn.device import DeviceMemory
from chatlearn.errors import WeightTransferError
from chatlearn.weights import broadcast
from chatlearn.weights.bucket import Bucket, unpacked
from chatlearn.weights.checksum import BLOCK_BYTES
from chatlearn.weights.device_memory import DeviceMemoryReceiver
from chatlearn.weights.sender import build_sender
from chatlearn.weights.wire import (
    BeginUpdate,
    FinishUpdate,
    OpenTransfer,
    Receiver,
    TransferMessage,
    UpdateWeights,
    WireKind,
    WireMeeting,
)

# vLLM's own imports warn of torch's and Python's deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

HOST = torch.device("cpu")
MEETING = WireMeeting("127.0.0.1", 29500, num_engine_ranks=1)


class Worker:
    """An ``EngineClient`` that is the engine too; ``damage`` acts on what arrived before it is checked."""

    def __init__(self) -> None:
        self.receiver: Receiver | None = None
        self.messages: list[TransferMessage] = []
        self.arrived: dict[str, Tensor] = {}

    def damage(self, memory: Tensor) -> None: ...

    def send(self, message: TransferMessage) -> None:
        self.messages.append(message)
        if isinstance(message, UpdateWeights):
            assert self.receiver is not None
            bucket = Bucket(**message.info)
            memory = self.receiver.copy_of(bucket)
            self.damage(memory)
            self.arrived.update(unpacked(bucket, memory))
        if isinstance(message, FinishUpdate):
            assert self.receiver is not None
            self.receiver.release()


class BadLine(Worker):
    def damage(self, memory: Tensor) -> None:
        memory[5] ^= 1


class HostMemory:
    """Memory of the host that is shared and opened as a GPU's would be, within one process."""

    def __init__(self) -> None:
        self.shared: dict[bytes, Tensor] = {}
        self.num_opened = 0

    def share(self, memory: Tensor) -> DeviceMemory:
        handle = str(len(self.shared)).encode()
        self.shared[handle] = memory
        return DeviceMemory("gpu-0", handle, memory.nbytes, 0, b"", 0, b"", event_is_waited_for=False)

    def open(self, shared: DeviceMemory, memory_device: torch.device) -> Tensor:
        self.num_opened += 1
        return self.shared[shared.handle]


@pytest.fixture
def host_memory(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    memory = HostMemory()
    monkeypatch.setattr(device, "share_memory", memory.share)
    monkeypatch.setattr(device, "open_memory", memory.open)
    monkeypatch.setattr(device, "unit_of", lambda memory_device: "gpu-0")
    return memory


class Group:
    """A communicator of two, the trainer and one worker, over a queue."""

    def __init__(self, line: queue.Queue[Tensor], *, is_sender: bool) -> None:
        self._line = line
        self._is_sender = is_sender
        self.is_open = True

    def broadcast(self, tensor: Tensor, src: int) -> None:
        assert src == 0
        if self._is_sender:
            self._line.put(tensor.clone())
        else:
            tensor.copy_(self._line.get(timeout=10))

    def destroy(self) -> None:
        self.is_open = False


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """The worker's end; vLLM's meeting hands out the trainer's."""
    from vllm.distributed.weight_transfer import nccl_common

    line: queue.Queue[Tensor] = queue.Queue()
    told: list[Any] = []
    monkeypatch.setattr(nccl_common, "trainer_init", lambda info: told.append(info) or Group(line, is_sender=True))
    return Group(line, is_sender=False)


def several_buckets() -> Weights:
    return Weights({f"w{index}": torch.randn(BLOCK_BYTES // 4) for index in range(5)})


def assert_arrived(worker: Worker, source: Weights, version: int) -> None:
    assert {name: bits(tensor) for name, tensor in worker.arrived.items()} == {
        name: bits(tensor) for name, tensor in source.tensors.items()
    }
    kinds = [type(message) for message in worker.messages]
    assert kinds[:2] == [OpenTransfer, BeginUpdate]
    assert kinds[2:-1] == [UpdateWeights] * (len(kinds) - 3)
    assert worker.messages[-1] == FinishUpdate(version)


def test_ipc_opens_the_memory_once_for_an_update_and_lets_go_of_it(host_memory: HostMemory) -> None:
    worker, source = Worker(), several_buckets()
    worker.receiver = DeviceMemoryReceiver(HOST)
    sender = build_sender("ipc", source, worker, 0, HOST)
    sender._bucket_bytes = 2 * BLOCK_BYTES
    sender.send(3)
    assert_arrived(worker, source, 3)
    assert sum(isinstance(message, UpdateWeights) for message in worker.messages) == 3
    assert (host_memory.num_opened, worker.receiver._opened) == (1, None)
    sender.send(4)
    assert host_memory.num_opened == 2


def test_ipc_sends_plain_values_and_no_code() -> None:
    shared = DeviceMemory("gpu-0", b"handle", 5, 0, b"counter", 0, b"event", event_is_waited_for=True)
    assert {type(value) for value in asdict(shared).values()} <= {str, bytes, int, bool}


def test_ipc_names_the_gpu_that_no_trainer_rank_is_on(host_memory: HostMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    worker.receiver = DeviceMemoryReceiver(HOST)
    sender = build_sender("ipc", make_weights([[2]], 0), worker, 0, HOST)
    names = iter(["gpu-1"])
    monkeypatch.setattr(device, "unit_of", lambda memory_device: next(names))
    with pytest.raises(WeightTransferError, match="lie on gpu-0 and this engine's worker is on gpu-1"):
        sender.send(1)


def test_nccl_tells_and_broadcasts_at_once(group: Group) -> None:
    worker, source = Worker(), several_buckets()
    worker.receiver = broadcast.BroadcastReceiver(group, HOST)
    sender = build_sender("nccl", source, worker, 0, HOST, MEETING)
    sender._bucket_bytes = 2 * BLOCK_BYTES
    sender.send(5)
    assert_arrived(worker, source, 5)
    opened = worker.messages[0]
    assert isinstance(opened, OpenTransfer)
    assert opened.info == {"master_address": "127.0.0.1", "master_port": 29500, "world_size": 2, "rank_offset": 1}
    worker.receiver.close()
    assert not group.is_open


def test_nccl_reports_an_engine_that_never_joins_instead_of_waiting_for_it(group: Group) -> None:
    class Refusing(Worker):
        def send(self, message: TransferMessage) -> None:
            if isinstance(message, UpdateWeights):
                raise WeightTransferError("w0: the engine does not expect a tensor of this name")

    with pytest.raises(WeightTransferError, match="w0: the engine does not expect"):
        build_sender("nccl", several_buckets(), Refusing(), 0, HOST, MEETING).send(1)


def test_nccl_other_ranks_only_take_part_in_the_export() -> None:
    worker, walked = Worker(), threading.Event()

    class Walked(Weights):
        def export_weights(self) -> Iterator[tuple[str, Tensor]]:
            yield from self.tensors.items()
            walked.set()

    build_sender("nccl", Walked(several_buckets().tensors), worker, 1, HOST, MEETING).send(1)
    assert (walked.is_set(), worker.messages) == (True, [])


@pytest.mark.parametrize("kind", ["ipc", "nccl"])
def test_a_byte_that_changes_on_its_way_is_seen_and_its_tensor_named(
    kind: WireKind, host_memory: HostMemory, group: Group
) -> None:
    worker = BadLine()
    worker.receiver = DeviceMemoryReceiver(HOST) if kind == "ipc" else broadcast.BroadcastReceiver(group, HOST)
    with pytest.raises(WeightTransferError, match=r"^w0: the bytes that arrived are not those that were sent"):
        build_sender(kind, several_buckets(), worker, 0, HOST, MEETING).send(1)


def test_torch_shares_device_memory_by_the_names_we_use() -> None:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    known = set(inspect.signature(rebuild_cuda_tensor).parameters)
    source = inspect.getsource(device.share_memory) + inspect.getsource(device.open_memory)
    used = {name for name in known if f'"{name}"' in source or f"{name}=" in source}
    assert known == used


def test_vllms_meeting_and_communicator_are_called_as_they_are_defined() -> None:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.weight_transfer import nccl_common

    info = {"master_address": "127.0.0.1", "master_port": 29500, "world_size": 2, "rank_offset": 1}
    assert nccl_common.NCCLWeightTransferInitInfo(**info).world_size == 2
    inspect.signature(nccl_common.trainer_init).bind(info)
    inspect.signature(nccl_common.worker_init_process_group).bind(info, None)
    inspect.signature(PyNcclCommunicator.broadcast).bind(None, torch.zeros(1), src=0)
    inspect.signature(PyNcclCommunicator.destroy).bind(None)


def test_every_wire_is_registered_with_vllm_and_opens_its_own_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from chatlearn.rollout import vllm_worker
    from chatlearn.rollout.vllm_engine import BACKEND_PREFIX

    monkeypatch.setattr(
        vllm_worker, "join_as_worker", lambda info, parallel_config: Group(queue.Queue(), is_sender=False)
    )
    opened: dict[WireKind, str] = {}
    settings = SimpleNamespace(parallel_config=None, model_config=None)
    for wire in get_args(WireKind):
        config = WeightTransferConfig(backend=BACKEND_PREFIX + wire)
        engine: Any = WeightTransferEngineFactory.create_engine(config, settings, HOST, torch.nn.Linear(1, 1))
        engine.shutdown()  # also before it was opened
        engine.init_transfer_engine(engine.parse_init_info({}))
        opened[wire] = type(engine._receiver).__name__
    assert opened == {
        "shared_memory": "SharedMemoryReceiver",
        "ipc": "DeviceMemoryReceiver",
        "nccl": "BroadcastReceiver",
    }


def test_vllm_builds_a_bucket_from_a_message_as_it_comes() -> None:
    from chatlearn.rollout.vllm_worker import BucketEngine

    bucket = Bucket(0, 5, ["w"], ["float32"], [[1]], [0], [7], {"unit": "gpu-0"})
    assert BucketEngine.update_info_cls(**bucket.message()) == bucket
