"""Which process lives where: one bundle of resources for each node of the plan, shared by roles that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from chatlearn.errors import ConfigError, RunError

READY_TIMEOUT_S = 300.0  # An autoscaled cluster may need minutes to bring a node.
ASK_EVERY_S = 1.0


@dataclass(frozen=True)
class Demand:
    """What a run asks of the cluster, counted before anything is placed.

    ``blocks`` has the number of slots that must lie together on a node, for each node of the plan. A slot is one
    accelerator on CUDA, one core's worth of scheduling on the CPU. ``num_cpus`` is asked for in addition by actors
    without a slot (the reward workers).
    """

    blocks: tuple[int, ...]
    accelerated: bool
    num_cpus: int

    @property
    def num_slots(self) -> int:
        """Slots on all nodes together."""
        return sum(self.blocks)


@dataclass(frozen=True)
class Slot:
    """A part of a bundle of the placement group, and the accelerator that is meant (``None`` on the CPU)."""

    bundle: int
    device_index: str | None


class Placement:
    """The placement group of a run; slots are numbered block after block, as the plan numbers them.

    Ray never splits a bundle, so what the plan puts on one node is on one node, whatever else the cluster does.
    """

    def __init__(self, group: PlacementGroup, slots: Sequence[Slot]) -> None:
        self.group = group
        self.slots = tuple(slots)

    @classmethod
    def open(cls, demand: Demand, heartbeat: Callable[[], None]) -> Placement:
        """Reserve the slots; says what is missing when the cluster cannot hold the run."""
        _check_room(demand)
        bundles = [{resource: float(block) for resource in _resources(demand)} for block in demand.blocks]
        # Each block gets a node of its own where there are enough: that is how engines come to be spread.
        group = placement_group(bundles, strategy="SPREAD")
        if not _granted(group, heartbeat):
            remove_placement_group(group)
            raise RunError(
                f"Ray did not grant {bundles}, each on one node, within {READY_TIMEOUT_S:.0f} s; other jobs of the "
                f"cluster may hold them: free now {ray.available_resources()}"
            )
        slots = [
            Slot(bundle, index)
            for bundle, block in enumerate(demand.blocks)
            for index in (_device_indices(group, bundle, block) if demand.accelerated else [None] * block)
        ]
        return cls(group, slots)

    def close(self) -> None:
        """Give the slots back."""
        remove_placement_group(self.group)

    def options(self, slot: Slot, environment: dict[str, str]) -> dict[str, Any]:
        """Actor options for a process that lives in ``slot``.

        It asks Ray for nothing: the bundle is ours, and which of its accelerators the process sees is written in the
        environment. Shares of accelerators that Ray deals out by itself may leave no whole share for the last process.
        """
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=slot.bundle)
        return {
            "num_cpus": 0,
            "num_gpus": 0,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": environment},
        }


def _resources(demand: Demand) -> tuple[str, ...]:
    return ("CPU", "GPU") if demand.accelerated else ("CPU",)


def _check_room(demand: Demand) -> None:
    have = ray.cluster_resources()
    problems: list[str] = []
    if demand.accelerated and have.get("GPU", 0) < demand.num_slots:
        problems.append(
            f"the configuration needs {demand.num_slots} GPUs, but the Ray cluster has {have.get('GPU', 0):.0f}; "
            "lower models.*.num_gpu or add nodes"
        )
    need_cpus = demand.num_slots + demand.num_cpus
    if have.get("CPU", 0) < need_cpus:
        problems.append(
            f"the configuration needs {need_cpus} CPUs in Ray's count, but the cluster has {have.get('CPU', 0):.0f}; "
            "lower models.reward.num_cpu or add nodes"
        )
    if problems:
        raise ConfigError(*problems)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource in _resources(demand):
        sizes = [int(node.get(resource, 0)) for node in nodes]
        if not may_hold(demand.blocks, sizes):
            raise ConfigError(
                f"the configuration needs {' + '.join(map(str, demand.blocks))} {resource}s, each number on one node, "
                f"but the nodes of the Ray cluster have {', '.join(map(str, sorted(sizes, reverse=True)))}; set NNODES "
                "(and GPUS_PER_NODE) to what the cluster is, or lower models.*.num_gpu"
            )


def may_hold(blocks: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether nodes of these sizes are large enough for the blocks: for as many as there are of at least each size.

    >>> may_hold((8, 4), (8, 4)), may_hold((8, 4), (6, 6))
    (True, False)
    """
    return all(
        sum(size // block for size in sizes) >= sum(1 for other in blocks if other >= block) for block in set(blocks)
    )


def _device_indices(group: PlacementGroup, bundle: int, block: int) -> list[str]:
    """What the accelerators of a bundle are called on their node, in order."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    look = ray.remote(_look_around).options(num_cpus=0, num_gpus=block, scheduling_strategy=strategy)
    try:
        found: list[str] = ray.get(look.remote())
    except RayError as error:
        raise RunError(f"Ray could not start a process in bundle {bundle} of the run: {error}") from None
    return found


def _look_around() -> list[str]:
    return sorted((str(device) for device in ray.get_gpu_ids()), key=lambda name: (len(name), name))


def _granted(group: PlacementGroup, heartbeat: Callable[[], None]) -> bool:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if group.wait(ASK_EVERY_S):
            return True
        heartbeat()
    return False
