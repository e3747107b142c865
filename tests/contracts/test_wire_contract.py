"""What every wire must do: each tensor arrives, equal bit for bit, under one version, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chatlearn.errors import WeightTransferError
from chatlearn.weights.checksum import BLOCK_BYTES
from chatlearn.weights.sender import build_sender
from chatlearn.weights.shared_memory import SharedMemorySender, read_bucket
from chatlearn.weights.wire import (
    BeginUpdate,
    FinishUpdate,
    OpenTransfer,
    TensorMeta,
    TransferMessage,
    UpdateWeights,
)


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
    block, numbers = BLOCK_BYTES, BLOCK_BYTES // 4
    small = {f"w{index}": torch.randn(numbers - 5) for index in range(10)}  # a little less than a block
    source, receiver = Weights(small | {"large": torch.randn(6 * numbers)}), Receiver()
    SharedMemorySender(source, receiver, rank=0, bucket_bytes=4 * block).send(1)
    buckets = [message.info for message in receiver.messages if isinstance(message, UpdateWeights)]
    assert [bucket["num_bytes"] for bucket in buckets] == [4 * block, 4 * block, 2 * block, 6 * block]
    assert {bucket["place"]["num_bytes"] for bucket in buckets} == {2 * 6 * block}
    assert [bucket["start"] for bucket in buckets] == [0, 6 * block, 0, 6 * block]
    SharedMemorySender(source, receiver, rank=0).send(2)
    assert len([m for m in receiver.messages if isinstance(m, UpdateWeights)]) == 4 + 1


def test_the_next_bucket_is_packed_while_an_engine_takes_one() -> None:
    exported = {name: threading.Event() for name in ("w0", "w1", "w2")}

    class Watched(Weights):
        def export_weights(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.tensors.items():
                exported[name].set()
                yield name, tensor

    class Slow(Receiver):
        def send(self, message: TransferMessage) -> None:
            if isinstance(message, UpdateWeights) and message.info["names"] == ["w0"]:
                # A bucket is closed when the next tensor does not fit, so only the third is a sign.
                assert exported["w2"].wait(timeout=10), "the trainer waited for the engine"
            super().send(message)

    source, engine = Watched({name: torch.randn(BLOCK_BYTES // 4) for name in exported}), Slow()
    SharedMemorySender(source, engine, rank=0, bucket_bytes=BLOCK_BYTES).send(1)
    assert all(torch.equal(engine.arrived[name], tensor) for name, tensor in source.tensors.items())


class CountCopies(TorchDispatchMode):
    """How many tensors are copied into other memory."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **kwargs or {})


def test_experts_of_a_layer_are_packed_in_bulk() -> None:
    experts = torch.randn(8, 2, BLOCK_BYTES // 4)
    names = [f"experts.{expert}.{half}" for expert in range(8) for half in ("gate", "up")]
    source, receiver = (
        Weights(dict(zip(names, experts.flatten(0, 1), strict=True)) | {"norm": torch.ones(3)}),
        Receiver(),
    )
    with CountCopies() as copies:
        SharedMemorySender(source, receiver, rank=0).send(1)
    assert copies.count == 2
    assert all(torch.equal(receiver.arrived[name], tensor) for name, tensor in source.tensors.items())


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

    stats = build_sender("shared_memory", Walked(source.tensors), receiver, 1, torch.device("cpu")).send(3)
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
        ({"num_bytes": 2**40}, "cannot open the trainer's weights"),
    ],
)
def test_what_cannot_be_trusted_is_refused(change: dict[str, Any], complaint: str) -> None:
    class Mangling:
        def send(self, message: TransferMessage) -> None:
            if isinstance(message, UpdateWeights):
                read_bucket({**message.info, "place": {**message.info["place"], **change}})

    with pytest.raises(WeightTransferError, match=complaint):
        SharedMemorySender(make_weights([[5]], 0), Mangling(), rank=0).send(1)


@pytest.mark.parametrize("victim", ["first", "middle", "last"])
def test_a_byte_that_changes_on_its_way_is_seen_and_its_tensor_named(victim: str) -> None:
    class BadMemory(Receiver):
        """One byte changes after the sender wrote it and before the engine reads it."""

        def send(self, message: TransferMessage) -> None:
            if isinstance(message, UpdateWeights) and victim in message.info["names"]:
                place, offsets = message.info["place"], message.info["offsets"]
                with Path(f"/proc/{place['pid']}/fd/{place['descriptor']}").open("r+b") as memory:
                    memory.seek(message.info["start"] + offsets[message.info["names"].index(victim)] + 7)
                    byte = memory.read(1)[0]
                    memory.seek(-1, os.SEEK_CUR)
                    memory.write(bytes([byte ^ 16]))
            super().send(message)

    source = Weights({"first": torch.randn(4), "middle": torch.randn(3, 5).bfloat16(), "last": torch.zeros(2)})
    with pytest.raises(WeightTransferError, match=rf"^{victim}: the bytes that arrived are not those that were sent"):
        SharedMemorySender(source, BadMemory(), rank=0).send(1)


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
