"""How fast new weights reach an engine on the same GPU: the trainer's and the engine's end in two plain processes.

    python benchmarks/gpu/transfer.py [--shapes qwen3-4b ...] [--bucket-mib 256 1024]
    python benchmarks/gpu/transfer.py --device cpu --tiny     # a rehearsal of seconds, without figures worth keeping

Needs torch, transformers, safetensors and numpy only; from a copy of the repository that is not installed, set
``PYTHONPATH=.``. The table goes to standard output and to ``benchmarks/results/transfer_gpu.md`` (``--output``).

This process is the trainer: float32 masters, cast as they are exported, packed and summed up by the code of a run. The
other is an engine without vLLM: it copies each bucket, checks it, and writes it over parameters of its own. Between
them is CUDA IPC, or shared memory on the CPU. What vLLM does when it loads, and gathering over ranks, come on top.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from chatlearn import device
from chatlearn.errors import WeightTransferError
from chatlearn.models.family import family_of
from chatlearn.weights.bucket import DTYPES, Bucket, unpacked
from chatlearn.weights.device_memory import DeviceMemoryCarrier, DeviceMemoryReceiver
from chatlearn.weights.send import BucketSender
from chatlearn.weights.shared_memory import SharedMemoryCarrier, SharedMemoryReceiver
from chatlearn.weights.wire import Carrier, FinishUpdate, Receiver, TensorMeta, TransferMessage, UpdateWeights

SHAPES = Path(__file__).parent / "shapes"
RESULTS = Path(__file__).parents[1] / "results" / "transfer_gpu.md"
REAL_SHAPES = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-30b-a3b-4-layers")
TINY_SHAPES = ("tiny", "tiny-moe")
NUM_WARM_UPS = 2  # memory is reserved in the first, kernels are loaded
NUM_TRANSFERS = 7
MIB = 2**20

EXPLANATION = """\
Seconds are those of a whole transfer, from the announcement of the version to the engine's word that all is there: cast
from float32, pack, checksums, handing over, copy, checksums again, overwriting the engine's parameters. Medians. The
plain copy is one of as many bytes from one place of the device to another. Checksums are shown in milliseconds, of
trainer and engine, and as a share of the transfer; a real transfer takes longer and their share of it is smaller.

The aim is below 0.25 s for 4B. Published for colocated engines: 0.21 to 0.34 s.
"""


class Masters:
    """A ``WeightSource`` of a model's shape: random float32 parameters, exported as the trainer does it."""

    def __init__(self, shape: str, where: torch.device, dtype: device.DtypeName) -> None:
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text((SHAPES / f"{shape}.json").read_text())
            self._family = family_of(Path(folder))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._parameters: dict[str, Tensor] = {}
        self._where = where
        self._dtype = dtype

    def fill(self) -> None:
        """Take memory, and give every parameter values of its own; whoever only asks for names needs none."""
        self._parameters = {name: torch.randn(shape, device=self._where) for name, shape in self._shapes.items()}

    def metadata(self) -> list[TensorMeta]:
        return [
            TensorMeta(stored_name, self._dtype, tuple(piece.shape))
            for name, shape in self._shapes.items()
            for stored_name, piece in self._family.export(name, torch.empty(shape, device="meta"))
        ]

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield from self._family.export(name, parameter.to(DTYPES[self._dtype]))


@dataclass(frozen=True)
class Order:
    """What the engine's process is asked beside a transfer: ``checksum_s`` of the last, or ``damage`` to the next."""

    word: str


class PlainEngine:
    """The other process: parameters under their stored names, and the engine's end of the wire."""

    def __init__(self, shape: str, kind: device.DeviceKind) -> None:
        where = device.rank_device(kind)
        metas = Masters(shape, where, device.compute_dtype(kind)).metadata()
        self._parameters = {
            meta.name: torch.zeros(meta.shape, dtype=DTYPES[meta.dtype], device=where) for meta in metas
        }
        self._receiver: Receiver = DeviceMemoryReceiver(where) if kind == "cuda" else SharedMemoryReceiver()
        self._where = where
        self._missing = set(self._parameters)
        self._checksum_s = 0.0
        self._damages = False

    def answer(self, asked: TransferMessage | Order) -> object:
        """Act on a message; what is returned goes back over the pipe."""
        match asked:
            case Order("checksum_s"):
                return self._checksum_s
            case Order("damage"):
                self._damages = True
            case UpdateWeights(info):
                self._load(Bucket(**info))
            case FinishUpdate():
                device.wait_for(self._where)
                self._receiver.release()
                if self._missing:
                    raise WeightTransferError(f"{min(self._missing)} did not arrive")
            case _:
                self._missing = set(self._parameters)
                self._checksum_s = 0.0
        return None

    def _load(self, bucket: Bucket) -> None:
        memory = self._receiver.copy_of(bucket)
        if self._damages:
            memory[bucket.offsets[-1]] ^= 1
        device.wait_for(self._where)
        started = time.perf_counter()
        pairs = unpacked(bucket, memory)
        self._checksum_s += time.perf_counter() - started
        for name, tensor in pairs:
            self._parameters[name].copy_(tensor)
            self._missing.discard(name)
        device.wait_for(self._where)  # the trainer may fill its memory again


def serve(pipe: Connection, shape: str, kind: device.DeviceKind) -> None:
    """Be an engine until the trainer hangs up; an error goes back as its text."""
    device.set_num_threads(1)
    engine = PlainEngine(shape, kind)
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        try:
            pipe.send(engine.answer(asked))
        except WeightTransferError as error:
            pipe.send(str(error))


class PipeClient:
    """An ``EngineClient`` to the process at the other end."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, message: TransferMessage) -> None:
        complaint = self.ask(message)
        if complaint is not None:
            raise WeightTransferError(str(complaint))

    def ask(self, asked: TransferMessage | Order) -> object:
        self._pipe.send(asked)
        return self._pipe.recv()


@dataclass(frozen=True)
class Measured:
    """One row: medians over transfers, and what a damaged byte was answered with."""

    num_tensors: int
    num_bytes: int
    seconds: float
    trainer_checksum_s: float
    engine_checksum_s: float
    copy_s: float
    complaint: str


def measure(shape: str, bucket_bytes: int, options: argparse.Namespace) -> Measured:
    """Transfer a few times to a fresh engine."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    engine = context.Process(target=serve, args=(theirs, shape, options.device), daemon=True)
    engine.start()
    ours.recv()
    try:
        # The declared type of a pipe's end is that of another operating system too.
        return transfer(shape, PipeClient(cast("Connection", ours)), bucket_bytes, options)
    finally:
        ours.send(None)
        engine.join()
        device.empty_cache(options.device)


def transfer(shape: str, client: PipeClient, bucket_bytes: int, options: argparse.Namespace) -> Measured:
    """The transfers, each of other weights; then one that is damaged."""
    where = device.rank_device(options.device)
    source = Masters(shape, where, device.compute_dtype(options.device))
    carrier: Carrier = DeviceMemoryCarrier(client, 0, where) if where.type == "cuda" else SharedMemoryCarrier(client, 0)
    sender = BucketSender(source, client, 0, carrier, bucket_bytes)
    sent, engine_checksum_s = [], []
    for version in range(NUM_WARM_UPS + options.transfers):
        source.fill()
        device.wait_for(where)
        sent.append(sender.send(version))
        engine_checksum_s.append(float(str(client.ask(Order("checksum_s")))))
    copy_s = copy_seconds(sent[0].num_bytes, where)
    client.ask(Order("damage"))
    try:
        sender.send(-1)
        complaint = "nothing: the checksums do not work here"
    except WeightTransferError as error:
        complaint = str(error)
    kept = sent[NUM_WARM_UPS:]
    return Measured(
        num_tensors=kept[0].num_tensors,
        num_bytes=kept[0].num_bytes,
        seconds=median(stats.seconds for stats in kept),
        trainer_checksum_s=median(stats.checksum_s for stats in kept),
        engine_checksum_s=median(engine_checksum_s[NUM_WARM_UPS:]),
        copy_s=copy_s,
        complaint=complaint,
    )


def copy_seconds(num_bytes: int, where: torch.device) -> float:
    """How long a plain copy of so many bytes takes on the device."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=where)
    target = torch.zeros_like(source)
    seconds: list[float] = []
    for _ in range(3):
        device.wait_for(where)
        started = time.perf_counter()
        target.copy_(source)
        device.wait_for(where)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def row(shape: str, bucket_bytes: int, measured: Measured) -> str:
    """One line of the table."""
    gigabytes = measured.num_bytes / 1e9
    checksum_s = measured.trainer_checksum_s + measured.engine_checksum_s
    return (
        f"| {shape} | {measured.num_tensors:,} | {gigabytes:.3f} | {bucket_bytes // MIB} | {measured.seconds:.4f} "
        f"| {gigabytes / measured.seconds:.3g} | {gigabytes / measured.copy_s:.3g} "
        f"| {1e3 * measured.trainer_checksum_s:.2f} + {1e3 * measured.engine_checksum_s:.2f} "
        f"| {100 * checksum_s / measured.seconds:.1f} % |"
    )


def report(shapes: Sequence[str], bucket_mib: Sequence[int], options: argparse.Namespace) -> str:
    """Measure every case, and say everything about it."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} processor, one thread"
    lines = [
        "# Weights from trainer to engine on one device",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- hardware: one {name}",
        f"- versions: Python {platform.python_version()}, torch {torch.__version__}",
        f"- {options.transfers} transfers of each kind after {NUM_WARM_UPS} to warm up",
        "",
        EXPLANATION,
        "| shape | tensors | GB | bucket, MiB | seconds | GB/s | plain copy, GB/s | checksums, ms | share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    complaints: list[str] = []
    for shape in shapes:
        for mib in bucket_mib:
            measured = measure(shape, mib * MIB, options)
            lines.append(row(shape, mib * MIB, measured))
            complaints.append(f"- {shape}: {measured.complaint}")
            print(lines[-1], flush=True)
    ending = [
        "",
        "How a transfer ended in which one bit was changed before the engine looked:",
        "",
        *complaints,
        "",
    ]
    print("\n".join(ending), flush=True)
    return "\n".join([*lines, *ending])


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two small shapes")
    parser.add_argument("--shapes", nargs="+", choices=[*REAL_SHAPES, *TINY_SHAPES])
    parser.add_argument("--bucket-mib", nargs="+", type=int)
    parser.add_argument("--transfers", type=int, default=NUM_TRANSFERS)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/transfer_gpu.md; none for a rehearsal")
    options = parser.parse_args()
    device.set_num_threads(1)
    shapes = options.shapes or (TINY_SHAPES if options.tiny else REAL_SHAPES)
    bucket_mib = options.bucket_mib or ([1] if options.tiny else [256, 1024])
    text = report(shapes, bucket_mib, options)
    output = options.output or (None if options.tiny else RESULTS)
    if output is not None:
        output.write_text(text)


if __name__ == "__main__":
    main()
