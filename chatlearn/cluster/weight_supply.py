"""How engines come by the trainer's weights: all of them at the start, and later each one that is started anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatlearn.cluster.fanout import Group, Member, Ticket, call
from chatlearn.cluster.workers import Luggage
from chatlearn.weights.wire import WireKind


@dataclass(frozen=True)
class Wiring:
    """The wire, the ranks of all engines together, and how long an engine may be silent in a transfer; seconds."""

    wire: WireKind
    num_engine_ranks: int
    silence_s: float


class WeightSupply:
    """The trainer's ranks, as those who bring weights to engines; ``luggage`` is what they must have with them."""

    def __init__(self, trainers: Group, wiring: Wiring, luggage: Luggage) -> None:
        self._trainers = trainers
        self._wiring = wiring
        self._luggage = replace(luggage, optimizer=False)

    def connect(self, engines: Sequence[Member]) -> None:
        """Open the wire between the trainer's ranks and these engines."""
        meeting = self._trainers.first("wire_meeting", self._wiring.num_engine_ranks)
        self._trainers.map("connect", self._wiring.wire, engines, meeting, self._wiring.silence_s)

    def __call__(self, newcomer: Member, everybody: Sequence[Member], version: int) -> Iterator[Sequence[Ticket]]:
        """Bring the weights, which are ``version``, to a newcomer; see ``Supply``."""
        if self._luggage.weights:
            yield self._all("bring", self._luggage)
        if self._wiring.wire == "nccl":  # A group that has lost a member is formed anew, with everybody in it.
            yield from self._meet_again(everybody, version)
        else:
            yield self._all("admit", newcomer, version)
        if self._luggage.weights:
            yield self._all("send_home", self._luggage)

    def _meet_again(self, everybody: Sequence[Member], version: int) -> Iterator[Sequence[Ticket]]:
        first = self._trainers.members[0]
        meeting = call(first, "wire_meeting", self._wiring.num_engine_ranks)
        yield [(meeting, first)]
        yield self._all("connect", self._wiring.wire, everybody, meeting, self._wiring.silence_s)
        yield self._all("send_weights", version)

    def _all(self, method: str, *arguments: Any) -> list[Ticket]:
        return self._trainers.start(method, [arguments] * len(self._trainers.members))
