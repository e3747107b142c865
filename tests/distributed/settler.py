"""A process that only looks around; in a module of its own because every such process imports it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray

from chatlearn.cluster.seat import Arrival, Seat, arrive


@dataclass(frozen=True)
class Spot:
    """What a process sees of its place; nodes that share one machine are told apart by their names only."""

    node: str
    devices: tuple[str, ...]


class Settler:
    """Takes no seat: torch, which that would import, has nothing to do with places."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat

    def arrive(self) -> Arrival:
        return arrive()

    def spot(self) -> Spot:
        devices = tuple(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
        return Spot(ray.get_runtime_context().get_node_id(), devices)

    def close(self) -> None:
        return None
