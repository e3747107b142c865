"""Which process lives where: one bundle of resources for every rank, shared by roles that take turns."""

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
PROBE_GPUS = 0.01


@dataclass(frozen=True)
class Demand:
    """What a run asks of the cluster, counted before anything is placed.

    ``num_slots`` processes each own a slot: one accelerator on CUDA, one core's worth of scheduling on the CPU.
    ``num_cpus`` is asked for in addition by actors without a slot (the reward workers).
    """

    num_slots: int
    accelerated: bool
    num_cpus: int


@dataclass(frozen=True)
class Slot:
    """One bundle of the placement group, and the accelerator that Ray gave it (``None`` on the CPU)."""

    bundle: int
    host: str
    device_index: str | None


class Placement:
    """The placement group of a run; slots are ordered by host and device, so that neighbours share a node."""

    def __init__(self, group: PlacementGroup, slots: Sequence[Slot], accelerated: bool) -> None:
        self.group = group
        self.slots = tuple(slots)
        self.accelerated = accelerated

    @classmethod
    def open(cls, demand: Demand, heartbeat: Callable[[], None]) -> Placement:
        """Reserve the slots; says what is missing when the cluster cannot hold the run."""
        _check_room(demand)
        bundle = {"CPU": 1.0, "GPU": 1.0} if demand.accelerated else {"CPU": 1.0}
        group = placement_group([bundle] * demand.num_slots, strategy="PACK")
        if not _granted(group, heartbeat):
            remove_placement_group(group)
            raise RunError(
                f"Ray did not grant {demand.num_slots} slots of {bundle} within {READY_TIMEOUT_S:.0f} s; other jobs of "
                f"the cluster may hold them: free now {ray.available_resources()}"
            )
        slots = [_probe(group, index, demand.accelerated) for index in range(demand.num_slots)]
        slots.sort(key=lambda slot: (slot.host, len(slot.device_index or ""), slot.device_index or "", slot.bundle))
        return cls(group, slots, demand.accelerated)

    def close(self) -> None:
        """Give the slots back."""
        remove_placement_group(self.group)

    def options(self, slot: Slot, device_share: float, environment: dict[str, str]) -> dict[str, Any]:
        """Actor options for a process that lives in ``slot`` and uses ``device_share`` of its accelerator."""
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=slot.bundle)
        return {
            "num_cpus": 0,
            "num_gpus": device_share if self.accelerated else 0,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": environment},
        }


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


def _probe(group: PlacementGroup, bundle: int, accelerated: bool) -> Slot:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    look = ray.remote(_look_around).options(
        num_cpus=0, num_gpus=PROBE_GPUS if accelerated else 0, scheduling_strategy=strategy
    )
    try:
        host, device_index = ray.get(look.remote())
    except RayError as error:
        raise RunError(f"Ray could not start a process in slot {bundle} of the run: {error}") from None
    return Slot(bundle, host, device_index)


def _look_around() -> tuple[str, str | None]:
    devices = ray.get_gpu_ids()
    return ray.util.get_node_ip_address(), str(devices[0]) if devices else None


def _granted(group: PlacementGroup, heartbeat: Callable[[], None]) -> bool:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if group.wait(ASK_EVERY_S):
            return True
        heartbeat()
    return False
