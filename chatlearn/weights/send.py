"""The trainer's end of each wire: one pass over the weights, bucket by bucket, under one version."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from chatlearn.errors import WeightTransferError
from chatlearn.weights.bucket import DEFAULT_BUCKET_BYTES, Packer, PackingPlan, meta_of, tensor_bytes
from chatlearn.weights.wire import (
    BeginUpdate,
    Carrier,
    EngineClient,
    FinishUpdate,
    Loan,
    OpenTransfer,
    TensorMeta,
    TransferStats,
    WeightSource,
)

if TYPE_CHECKING:
    from torch import Tensor


class BucketSender:
    """A ``WeightSender`` over any carrier: while engines take one bucket the next is packed.

    Extra memory is two buckets and two gathered parameters, never the model.
    """

    def __init__(
        self,
        source: WeightSource,
        client: EngineClient,
        rank: int,
        carrier: Carrier,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        self._source = source
        self._client = client
        self._rank = rank
        self._carrier = carrier
        self._bucket_bytes = bucket_bytes

    def open(self, info: Mapping[str, Any]) -> None:
        """Tell the engines what their end needs to know; returns when all of them are there."""
        self._tell(OpenTransfer(info))

    def send(self, version: int) -> TransferStats:
        """Carry all weights to the engines and call them ``version``; a collective over the trainer's ranks."""
        started = time.perf_counter()
        expected = self._source.metadata()
        plan = PackingPlan.of(expected, self._bucket_bytes)
        with self._carrier.lend(plan.num_bytes) as loan:
            self._tell(BeginUpdate(version))
            checksum_s = self._stream(loan, plan, expected)
            self._tell(FinishUpdate(version))
        num_bytes = sum(tensor_bytes(meta) for meta in expected)
        return TransferStats(version, len(expected), num_bytes, time.perf_counter() - started, checksum_s)

    def close(self) -> None:
        """Leave what the carrier is connected with."""
        self._carrier.close()

    def _stream(self, loan: Loan, plan: PackingPlan, expected: list[TensorMeta]) -> float:
        """The weights themselves; returns the seconds that checksums took."""
        pairs = in_declared_order(self._source, expected)
        if loan.memory is None:
            for _ in pairs:
                pass
            return 0.0
        packer = Packer(loan.memory, plan)
        with ThreadPoolExecutor(max_workers=1) as carrying:
            on_its_way: Future[None] | None = None
            for bucket in packer.buckets(pairs):
                if on_its_way is not None:
                    on_its_way.result()  # it lies where the packer goes next
                on_its_way = carrying.submit(loan.deliver, bucket)
            if on_its_way is not None:
                on_its_way.result()
        return packer.checksum_s

    def _tell(self, message: OpenTransfer | BeginUpdate | FinishUpdate) -> None:
        if self._rank == 0:
            self._client.send(message)


def in_declared_order(source: WeightSource, expected: list[TensorMeta]) -> Iterator[tuple[str, Tensor]]:
    """Export, holding the source to what its ``metadata`` said; the size of the memory was computed from that."""
    exported = source.export_weights()
    for meta, (name, tensor) in zip(expected, exported, strict=True):
        found = meta_of(name, tensor)
        if found != meta:
            raise WeightTransferError(f"the trainer declared {meta} and exported {found}; both must agree, in order")
        yield name, tensor
