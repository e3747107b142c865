"""The shell around a rollout engine: every call is short, so that an engine that hangs is noticed by the clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatlearn.cluster.seat import Arrival, Seat, arrive, take_seat
from chatlearn.errors import EngineFaultError

if TYPE_CHECKING:
    from chatlearn.rollout.engine import EngineSpec, Finished, Request, SamplingPlan, WakePart
    from chatlearn.weights.wire import TransferMessage


class RolloutWorker:
    """One replica of the rollout engine.

    Calls of the driver and of the trainer take turns: weights may arrive between two calls of ``work``.
    """

    def __init__(self, seat: Seat) -> None:
        take_seat(seat)

    def arrive(self) -> Arrival:
        """Tell where this process is."""
        return arrive()

    def open(self, engine: str, spec: EngineSpec) -> None:
        """Start the engine called ``engine``."""
        from chatlearn.models.naming import EMBEDDING
        from chatlearn.rollout.engine import build_engine
        from chatlearn.weights.checkpoint_source import expected_tensors

        self._vocabulary = expected_tensors(spec.model_path)[EMBEDDING][0]
        self._engine = build_engine(engine, spec)

    def prove(self, model_path: str) -> None:
        """Show that weights sent to this engine are the weights it samples from; raise when they are not."""
        from chatlearn.rollout.prove import prove_weight_transfer

        prove_weight_transfer(self._engine, model_path)

    def submit(self, requests: Sequence[Request], plan: SamplingPlan) -> None:
        """Queue requests; ``work`` answers them."""
        self._engine.submit(requests, plan)

    def work(self, patience_s: float) -> list[Finished]:
        """Compute for so many seconds and return the answers that came out.

        Raises ``EngineFaultError`` where one of them cannot be an answer.
        """
        from chatlearn.rollout.soundness import fault_of

        finished = list(self._engine.completions(patience_s))
        for item in finished:
            fault = fault_of(item, self._vocabulary)
            if fault is not None:
                raise EngineFaultError(f"it answered request {item.request_id} with {fault}")
        return finished

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests; they come out of ``work`` with the tokens they have."""
        self._engine.abort(request_ids)

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
