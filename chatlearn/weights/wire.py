"""How new weights travel from the trainer to the engines: messages, the faces of both ends, which wire fits where.

A transfer is one ``BeginUpdate``, some ``UpdateWeights`` and one ``FinishUpdate``, all of one version. The trainer's
side is a ``WeightSender``, the engine's side ``RolloutEngine.load_weights``; an ``EngineClient`` carries the messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from chatlearn.weights.bucket import Bucket

WireKind = Literal["ipc", "nccl", "shared_memory"]


@dataclass(frozen=True)
class TensorMeta:
    """One tensor as it will travel: Hugging Face name, torch's name of the dtype (``float32``), full shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """Something that can be exported again and again, the same names in the same order as ``metadata``.

    ``export_weights`` is a collective: every trainer rank runs it in step, and each tensor is whole on every rank.
    """

    def metadata(self) -> list[TensorMeta]: ...

    def export_weights(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class OpenTransfer:
    """Once, before the first update: what the engine's end of the wire needs to know to open."""

    info: Mapping[str, Any]


@dataclass(frozen=True)
class BeginUpdate:
    """The weights called ``version`` begin to arrive; nothing is sampled until they are complete."""

    version: int


@dataclass(frozen=True)
class UpdateWeights:
    """A part of the weights; ``info`` names the tensors (``names``, ``dtype_names``, ``shapes``) and where they lie."""

    info: Mapping[str, Any]


@dataclass(frozen=True)
class FinishUpdate:
    """Everything was sent; the engine proves that nothing is missing and calls what it samples now ``version``."""

    version: int


TransferMessage = OpenTransfer | BeginUpdate | UpdateWeights | FinishUpdate


@dataclass(frozen=True)
class TransferStats:
    """What one transfer moved, and the seconds from ``BeginUpdate`` to the end of ``FinishUpdate``.

    ``checksum_s`` of them went into the trainer's checksums; an engine's take as long again.
    """

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    checksum_s: float


class EngineClient(Protocol):
    """Delivers a message to every engine and returns when all of them have done it; raises what an engine raised.

    Messages come one after another, but not all from the same thread.
    """

    def send(self, message: TransferMessage) -> None: ...


class Loan(Protocol):
    """Memory of one update, to be packed again and again; on a rank that packs nothing ``memory`` is ``None``."""

    @property
    def memory(self) -> Tensor | None: ...

    def deliver(self, bucket: Bucket) -> None:
        """Have every engine take a copy of what the bucket says is in the memory; returns when all have it.

        Called in a thread of its own, while the next bucket is packed.
        """
        ...


class Carrier(Protocol):
    """The trainer's end of a medium: how memory that was packed comes to the engines."""

    def lend(self, num_bytes: int) -> AbstractContextManager[Loan]: ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """An engine's end of a medium."""

    def copy_of(self, bucket: Bucket) -> Tensor:
        """The bytes of a bucket, on the engine's device, as a copy of its own: the memory is filled again."""
        ...

    def release(self) -> None:
        """Let go of the trainer's memory: the update is over, well or not."""
        ...

    def close(self) -> None: ...


class WeightSender(Protocol):
    """The trainer's end of a wire; lives in every trainer rank, and only rank 0 talks to the engines."""

    def send(self, version: int) -> TransferStats: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class WireMeeting:
    """Where the ``nccl`` wire meets: trainer rank 0's address, a free port there, and all engines' ranks together."""

    address: str
    port: int
    num_engine_ranks: int


def choose_wire(device_kind: Literal["cpu", "cuda"], colocated: bool) -> WireKind:
    """On the CPU shared memory; on GPUs handles where trainer and engine share them, NCCL where they do not."""
    if device_kind == "cpu":
        return "shared_memory"
    return "ipc" if colocated else "nccl"
