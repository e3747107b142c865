"""The shell around a rollout engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from chatlearn.cluster.seat import Arrival, Seat, arrive, take_seat

if TYPE_CHECKING:
    from chatlearn.rollout.engine import EngineSpec, Finished, Request, SamplingPlan, WakePart
    from chatlearn.weights.wire import TransferMessage

STREAM_EVERY_S = 0.25  # Completions travel to the driver in parcels of this much time: soon, but not one by one.


class RolloutWorker:
    """One replica of the rollout engine."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        take_seat(seat)

    def arrive(self) -> Arrival:
        """Tell where this process is."""
        return arrive()

    def open(self, engine: str, spec: EngineSpec) -> None:
        """Start the engine called ``engine``."""
        from chatlearn.rollout.engine import build_engine

        self._engine = build_engine(engine, spec)

    def prove(self, model_path: str) -> None:
        """Show that weights sent to this engine are the weights it samples from; raise when they are not."""
        from chatlearn.rollout.prove import prove_weight_transfer

        prove_weight_transfer(self._engine, model_path)

    def generate(self, requests: Sequence[Request], plan: SamplingPlan) -> Iterator[list[Finished]]:
        """Answer the requests; what finishes goes out in parcels as time passes."""
        self._engine.submit(requests, plan)
        parcel: list[Finished] = []
        sent = time.monotonic()
        for finished in self._engine.completions():
            parcel.append(finished)
            if time.monotonic() - sent > STREAM_EVERY_S:
                yield parcel
                parcel, sent = [], time.monotonic()
        if parcel:
            yield parcel

    def load_weights(self, message: TransferMessage) -> None:
        """Take part in a weight transfer."""
        self._engine.load_weights(message)

    def wake(self, part: WakePart) -> None:
        """Take a part of the device's memory back."""
        self._engine.wake(part)

    def sleep(self) -> None:
        """Give the device's memory away."""
        self._engine.sleep()

    def close(self) -> None:
        """Stop the engine and its processes."""
        self._engine.close()
