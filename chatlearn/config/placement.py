"""Which roles share devices, and which of them each process gets: ranks are packed by node, engines are spread.

Pure and settled before anything starts: the cluster grants what was planned here, or the run does not begin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from chatlearn.config.schema import GrpoConfig

Seat = tuple[int, int]  # A node, and the number of a device there.


@dataclass(frozen=True)
class DeviceGroup:
    """Roles that live on the same devices and take turns; ``sizes`` are the ``num_gpu`` of each, in the same order.

    They need not be equal: a smaller role uses some of the devices.
    """

    roles: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Devices of the group: as many as its largest role needs."""
        return max(self.sizes)

    def size_of(self, role: str) -> int:
        """``num_gpu`` of one role; 0 where it lives elsewhere."""
        return dict(zip(self.roles, self.sizes, strict=True)).get(role, 0)


@dataclass(frozen=True)
class Arrangement:
    """The slots of a run, numbered node after node: a slot is one device, or on the CPU one process's place.

    ``blocks`` has the number of slots on each node that is used. ``processes`` has, for each role and each of its
    processes, the slots that are its own; the process lives in the first. The slots of a process lie on one node.

    >>> # two nodes with two GPUs: trainer on the first, an engine that spans the two of the second
    >>> # Arrangement(blocks=(2, 2), processes={"policy_trainer": ((0,), (1,)), "policy": ((2, 3),)})
    """

    blocks: tuple[int, ...]
    processes: Mapping[str, tuple[tuple[int, ...], ...]]

    def node_of(self, slot: int) -> int:
        """The block that a slot belongs to."""
        return next(node for node, after in enumerate(accumulate(self.blocks)) if slot < after)

    def most_on_a_node(self, role: str) -> int:
        """Slots of a role on the node that has most of them."""
        return max(Counter(self.node_of(slot) for process in self.processes[role] for slot in process).values())


def base_is_reference(config: GrpoConfig) -> bool:
    """Whether the reference is the very model that a LoRA adapter was put on, so that no second copy is needed."""
    trainer, asked = config.models.policy_trainer, config.models.ref_policy.load
    return trainer.kl_coef > 0 and trainer.lora.rank > 0 and asked in (None, trainer.load)


def device_sizes(config: GrpoConfig) -> dict[str, int]:
    """``num_gpu`` of every role that runs and holds a model."""
    models = config.models
    sizes = {"policy": models.policy.num_gpu, "policy_trainer": models.policy_trainer.num_gpu}
    if models.policy_trainer.kl_coef > 0 and not base_is_reference(config):
        asked = models.ref_policy.num_gpu
        sizes["ref_policy"] = models.policy_trainer.num_gpu if asked is None else asked
    return sizes


def device_groups(config: GrpoConfig) -> tuple[DeviceGroup, ...]:
    """Roles by ``runtime_args.colocation``; a role that no list names has devices of its own.

    >>> # colocation=[policy,policy_trainer] with kl_coef=0.1: the reference model stands apart
    >>> # (DeviceGroup(("policy", "policy_trainer"), (8, 8)), DeviceGroup(("ref_policy",), (8,)))
    """
    sizes = device_sizes(config)
    named = [tuple(role for role in group if role in sizes) for group in config.runtime_args.colocation]
    placed = {role for group in named for role in group}
    alone = [(role,) for role in sizes if role not in placed]
    return tuple(DeviceGroup(roles, tuple(sizes[role] for role in roles)) for roles in [*named, *alone] if roles)


def arrange(
    groups: Sequence[DeviceGroup], engine_width: int, num_nodes: int, slots_per_node: int
) -> Arrangement | None:
    """Give every process its slots, on nodes of one size; None where they do not fit.

    The ranks of a group are packed: onto one node where one holds them all, or else onto as few as possible. Engines
    are spread, over the nodes of the ranks they live with or over what the others left; each lies inside one node.
    """
    room = [slots_per_node] * num_nodes
    tries = (_arranged(groups, engine_width, room, order) for order in (_tidy, _dense))
    return next((arrangement for arrangement in tries if arrangement is not None), None)


def arrange_anywhere(groups: Sequence[DeviceGroup], engine_width: int, num_nodes: int) -> Arrangement:
    """As ``arrange``, for nodes that hold whatever they are given: evenly, as far as engines are not torn apart."""
    total = sum(group.num_devices for group in groups)
    tries = (arrange(groups, engine_width, num_nodes, size) for size in range(-(-total // num_nodes), total + 1))
    arrangement = next((found for found in tries if found is not None), None)
    assert arrangement is not None, "one node holds everything, because an engine's width divides num_gpu"
    return arrangement


def _tidy(size: int, room: Sequence[int]) -> list[int]:
    """Nodes in the order in which ranks fill them: the fullest that holds them all, or else the emptiest first."""
    holding = [node for node, free in enumerate(room) if free >= size]
    if holding:
        return [min(holding, key=lambda node: room[node])]
    return sorted(range(len(room)), key=lambda node: -room[node])


def _dense(size: int, room: Sequence[int]) -> list[int]:
    """Without a gap: a group may begin where another ended, which leaves whole nodes to wide engines."""
    del size
    return list(range(len(room)))


def _arranged(
    groups: Sequence[DeviceGroup],
    engine_width: int,
    room: Sequence[int],
    order: Callable[[int, Sequence[int]], list[int]],
) -> Arrangement | None:
    free = list(room)
    seats: dict[str, list[list[Seat]]] = {}
    for group in sorted(groups, key=lambda group: group.roles == ("policy",)):  # Engines apart take what is left.
        num_engines = group.size_of("policy") // engine_width
        if group.roles == ("policy",):
            taken = [engine_width * count for count in _spread(num_engines, engine_width, free)]
        else:
            taken = _packed(group.num_devices, free, order(group.num_devices, free))
        own = [(node, room[node] - free[node] + index) for node, count in enumerate(taken) for index in range(count)]
        engines = _engine_seats(_engine_pool(group, own), num_engines, engine_width, len(room))
        if len(own) < group.num_devices or len(engines) < num_engines:
            return None
        seats |= {role: [[seat] for seat in own[:size]] for role, size in zip(group.roles, group.sizes, strict=True)}
        seats |= {"policy": engines} if engines else {}
        free = [before - count for before, count in zip(free, taken, strict=True)]
    return _numbered(seats, [before - after for before, after in zip(room, free, strict=True)])


def _engine_pool(group: DeviceGroup, own: Sequence[Seat]) -> Sequence[Seat]:
    """Where a group's engines may be: beside trainer ranks, if there are any, because they bring the weights."""
    num_ranks = group.size_of("policy_trainer")
    return own[: max(num_ranks, group.size_of("policy"))] if num_ranks > 0 else own


def _packed(size: int, free: Sequence[int], order: Sequence[int]) -> list[int]:
    """How many of ``size`` each node takes, filled in this order."""
    taken = [0] * len(free)
    for node in order:
        taken[node] = min(free[node], size - sum(taken))
    return taken


def _spread(num_engines: int, width: int, free: Sequence[int]) -> list[int]:
    """How many engines each node takes: one after another goes to where most is free, while one fits anywhere."""
    taken = [0] * len(free)
    for _ in range(num_engines):
        left = [room - width * count for room, count in zip(free, taken, strict=True)]
        if max(left) < width:
            break
        taken[left.index(max(left))] += 1
    return taken


def _engine_seats(own: Sequence[Seat], num_engines: int, width: int, num_nodes: int) -> list[list[Seat]]:
    """Neighbouring seats of one node for each engine, as many as fit."""
    at = [[seat for seat in own if seat[0] == node] for node in range(num_nodes)]
    counts = _spread(num_engines, width, [len(seats) for seats in at])
    return [
        seats[width * engine : width * (engine + 1)]
        for seats, count in zip(at, counts, strict=True)
        for engine in range(count)
    ]


def _numbered(seats: Mapping[str, Sequence[Sequence[Seat]]], used: Sequence[int]) -> Arrangement:
    first = [0, *accumulate(used)]
    processes = {
        role: tuple(tuple(first[node] + index for node, index in process) for process in own)
        for role, own in seats.items()
    }
    return Arrangement(tuple(count for count in used if count > 0), processes)
