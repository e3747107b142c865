"""How a trainer rank talks to the rollout engines: the weights part's ``EngineClient`` over Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatlearn.cluster.fanout import Group, Member

if TYPE_CHECKING:
    from chatlearn.weights.wire import TransferMessage


class RayEngineClient:
    """Delivers a message to every engine and returns when all of them have acted on it."""

    def __init__(self, engines: Sequence[Member]) -> None:
        self._engines = Group(engines, heartbeat=_keep_waiting)

    def send(self, message: TransferMessage) -> None:
        """Raise ``WorkerError`` naming the engine that could not."""
        self._engines.map("load_weights", message)


def _keep_waiting() -> None:
    """Only the driver listens to Ctrl-C; a transfer that has begun is finished."""
