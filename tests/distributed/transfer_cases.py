"""What the ranks of a gang do in the tests of weight transfer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from cases import Setup
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chatlearn import device
from chatlearn.device import DeviceMemory
from chatlearn.errors import WeightTransferError
from chatlearn.models.lora import LoraSpec
from chatlearn.trainer.adapter import adapter_weights, load_adapter
from chatlearn.trainer.sharded_model import ShardedModel
from chatlearn.weights import device_memory
from chatlearn.weights.bucket import Bucket, unpacked
from chatlearn.weights.device_memory import DeviceMemoryCarrier, DeviceMemoryReceiver
from chatlearn.weights.send import BucketSender
from chatlearn.weights.shared_memory import SharedMemoryReceiver, SharedMemorySender
from chatlearn.weights.wire import TensorMeta, TransferMessage, UpdateWeights

BUCKET_BYTES = 2**18


class Complaining:
    """An ``EngineClient`` that is the engine too. It notes what is wrong: raised, it would leave other ranks alone."""

    def __init__(self, victim: str | None = None) -> None:
        self.arrived: dict[str, Tensor] = {}
        self.complaints: list[str] = []
        self._victim = victim

    def send(self, message: TransferMessage) -> None:
        if isinstance(message, UpdateWeights):
            bucket = Bucket(**message.info)
            if self._victim in bucket.names:
                flip(Path(f"/proc/{bucket.place['pid']}/fd/{bucket.place['descriptor']}"), bucket, self._victim)
            self.take(bucket, SharedMemoryReceiver().copy_of(bucket))

    def take(self, bucket: Bucket, memory: Tensor) -> None:
        try:
            self.arrived.update(unpacked(bucket, memory))
        except WeightTransferError as error:
            self.complaints.append(str(error))


def flip(file: Path, bucket: Bucket, name: str) -> None:
    """Change one bit of a tensor where it lies between trainer and engine."""
    start, end = bucket.borders()[bucket.names.index(name)]
    with file.open("r+b") as memory:
        memory.seek(bucket.start + (start + end) // 2)
        byte = memory.read(1)[0]
        memory.seek(-1, os.SEEK_CUR)
        memory.write(bytes([byte ^ 1]))


def model_of(setup: Setup, *, adapted: bool) -> ShardedModel:
    """The model, or one with an adapter that is not zero."""
    if not adapted:
        return ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    model = ShardedModel.load(replace(setup.spec(), lora=LoraSpec(2, 4.0)), setup.plan(), trainable=True)
    kept = {name: torch.full(factor.shape, 0.1) for name, factor in adapter_weights(model.module)}
    load_adapter(model.module, kept)
    return model


def sent_with_a_changed_byte(setup: Setup, adapted: bool, victim: str) -> list[str]:
    """What the engine complains of when one byte of ``victim`` changes on the way."""
    engine = Complaining(victim)
    SharedMemorySender(model_of(setup, adapted=adapted), engine, dist.get_rank(), BUCKET_BYTES).send(1)
    return engine.complaints


class WatchGathering(TorchDispatchMode):
    """Which dtypes are gathered, by the largest number of elements that a rank gave."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_gather" in str(func):
            dtype = str(args[0].dtype)
            self.largest[dtype] = max(self.largest.get(dtype, 0), args[0].numel())
        return func(*args, **kwargs or {})


def sent_in_the_compute_dtype(setup: Setup, adapted: bool) -> tuple[dict[str, int], set[str], list[str], list[str]]:
    """What was gathered, the dtypes that arrived, all names that were declared and all that arrived."""
    model, engine = model_of(setup, adapted=adapted), Complaining()
    with WatchGathering() as watch:
        SharedMemorySender(model, engine, dist.get_rank(), BUCKET_BYTES).send(1)
    declared = [meta.name for meta in model.metadata()]
    return watch.largest, {str(tensor.dtype) for tensor in engine.arrived.values()}, declared, list(engine.arrived)


class OwnWeights:
    """Equal on all ranks, as gathered weights are, but for one byte of ``w2`` on the ranks in ``damaged``."""

    def __init__(self, damaged: list[int]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tensors = {f"w{index}": torch.randn(20_000, generator=generator) for index in range(5)}
        if dist.get_rank() in damaged:
            self.tensors["w2"].view(torch.uint8)[77] ^= 4

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, "float32", tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()


class WorkerOnEachGpu(Complaining):
    """Rank 0's client: it plays the workers of all GPUs, each of which reads the memory on its own."""

    def send(self, message: TransferMessage) -> None:
        if isinstance(message, UpdateWeights):
            bucket = Bucket(**message.info)
            for rank in range(dist.get_world_size()):
                with patch.object(device, "unit_of", lambda _, rank=rank: f"gpu-{rank}"):
                    self.take(bucket, DeviceMemoryReceiver(torch.device("cpu")).copy_of(bucket))


class FilesForGpus:
    """Memory of the host, under the name of this rank's GPU, where the ``ipc`` wire would take that of a GPU."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("gpu")
        self.path = Path(f"/proc/{os.getpid()}/fd/{self.descriptor}")

    def empty(self, num_bytes: int, **_: object) -> Tensor:
        os.ftruncate(self.descriptor, num_bytes)
        return torch.from_file(str(self.path), shared=True, size=num_bytes, dtype=torch.uint8)

    def share(self, memory: Tensor) -> DeviceMemory:
        return DeviceMemory(
            unit=f"gpu-{dist.get_rank()}",
            handle=str(self.path).encode(),
            num_bytes=memory.nbytes,
            offset=0,
            counter=b"",
            counter_offset=0,
            event=b"",
            event_is_waited_for=False,
        )

    @staticmethod
    def open(shared: DeviceMemory, _: torch.device) -> Tensor:
        return torch.from_file(shared.handle.decode(), shared=False, size=shared.num_bytes, dtype=torch.uint8)


def sent_from_every_gpu(damaged: list[int]) -> list[str]:
    """What the workers of an ``ipc`` wire complain of."""
    files, engine, rank = FilesForGpus(), WorkerOnEachGpu(), dist.get_rank()
    carrier = DeviceMemoryCarrier(engine, rank, torch.device("cpu"))
    with (
        patch.object(device, "share_memory", files.share),
        patch.object(device, "open_memory", files.open),
        patch.object(device_memory, "torch", SimpleNamespace(empty=files.empty, uint8=torch.uint8)),
    ):
        BucketSender(OwnWeights(damaged), engine, rank, carrier, BUCKET_BYTES).send(1)
    os.close(files.descriptor)
    return engine.complaints
