"""How a trainer rank talks to the rollout engines: the weights part's ``EngineClient`` over Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from chatlearn.cluster.fanout import Member, call
from chatlearn.cluster.posts import BrokenError, take

if TYPE_CHECKING:
    from chatlearn.weights.wire import TransferMessage, TransferStats


@dataclass(frozen=True)
class Delivery:
    """What one transfer moved, and the engines that it lost on the way: rank and process number."""

    stats: TransferStats
    lost: tuple[tuple[int, int], ...]


class RayEngineClient:
    """Delivers a message to every engine and returns when all of them have acted on it.

    An engine that dies, or is silent for ``silence_s``, is left out from then on: a transfer goes on without it.
    """

    def __init__(self, engines: Sequence[Member], silence_s: float) -> None:
        self._engines = {engine.rank: engine for engine in engines}
        self._silence_s = silence_s
        self._lost: list[tuple[int, int]] = []

    def send(self, message: TransferMessage) -> None:
        """Raise ``WorkerError`` naming the engine that refuses what it was sent."""
        # Keys are Ray's references.
        waiting: dict[Any, Member] = {
            call(engine, "load_weights", message): engine for engine in self._engines.values()
        }
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=self._silence_s)
            if not ready:
                self._lose(*waiting.values())
                return
            for reference in ready:
                self._answered(reference, waiting.pop(reference))

    def admit(self, engine: Member) -> None:
        """Count on an engine that took the place of another."""
        self._engines[engine.rank] = engine

    def take_lost(self) -> tuple[tuple[int, int], ...]:
        """Rank and process number of those that were lost since this was asked before."""
        lost, self._lost = tuple(self._lost), []
        return lost

    def _answered(self, reference: Any, engine: Member) -> None:
        try:
            take(reference, engine)
        except BrokenError:
            self._lose(engine)

    def _lose(self, *engines: Member) -> None:
        for engine in engines:
            del self._engines[engine.rank]
            self._lost.append((engine.rank, engine.pid))
