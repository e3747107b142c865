"""How ranks share a model: who holds which part of it, and who works on which data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it too, but does not declare it
from torch.distributed.device_mesh import init_device_mesh

from chatlearn import device
from chatlearn.errors import ConfigError
from chatlearn.models.ulysses import SequenceGroup

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from chatlearn.device import DeviceKind

# A rank may load a large model from slow storage while the others wait for it in a collective.
COLLECTIVE_TIMEOUT = timedelta(hours=1)

SHARD_AXIS = "shard"
REPLICA_AXIS = "replica"
DATA_AXIS = "data"
SEQUENCE_AXIS = "sequence"


@dataclass(frozen=True)
class ParallelPlan:
    """``num_ranks`` processes that train one model.

    Each group of ``fsdp_size`` neighbouring ranks holds the model once, in shards. Each group of
    ``sequence_parallel_size`` neighbours works on the same sequences, so data is dealt to ``data_size`` groups.
    """

    num_ranks: int
    fsdp_size: int
    sequence_parallel_size: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"{name}={size} must be at least 1 and divide the number of ranks num_gpu={self.num_ranks}; "
            f"use {_choices(self.num_ranks)}"
            for name, size in (
                ("fsdp_size", self.fsdp_size),
                ("ulysses_sequence_parallel_size", self.sequence_parallel_size),
            )
            if size < 1 or self.num_ranks % size != 0
        ]
        if problems:
            raise ConfigError(*problems)

    @property
    def data_size(self) -> int:
        """Into how many parts a batch is dealt."""
        return self.num_ranks // self.sequence_parallel_size

    @property
    def num_replicas(self) -> int:
        """How many times the model exists; gradients are summed over replicas as well."""
        return self.num_ranks // self.fsdp_size

    def data_rank(self, rank: int) -> int:
        """Which part of a batch the rank works on."""
        return rank // self.sequence_parallel_size


def sequence_parallel_problem(size: int, num_ranks: int, num_attention_heads: int) -> str | None:
    """What is wrong with sharing each sequence among ``size`` ranks, for a user; ``None`` if it can be done.

    Key heads do not matter: they are repeated where there are too few.
    """
    common = gcd(num_ranks, num_attention_heads)
    if size >= 1 and common % size == 0:
        return None
    return (
        f"ulysses_sequence_parallel_size={size} must be at least 1 and divide both the number of ranks "
        f"num_gpu={num_ranks} and the model's {num_attention_heads} attention heads; use {_choices(common)}"
    )


def _choices(number: int) -> str:
    return " or ".join(str(size) for size in range(1, number + 1) if number % size == 0)


# Listeners live as long as their process: torch closes one that nobody holds.
_listeners: list[TCPStore] = []


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one model meet: torch's ``init_method`` (``tcp://host:port`` or ``file:///path``)."""

    place: str
    device_kind: DeviceKind


def hold_meeting_port(address: str) -> int:
    """Begin to listen for the other ranks, in the process that will be rank 0; returns the port, which nobody can take.

    ``open_process_group`` finds the listener by its address. A port that was merely free a moment ago may be taken
    before the ranks have loaded what they need to meet.
    """
    listener = TCPStore(address, 0, None, is_master=True, wait_for_workers=False, multi_tenant=True)
    _listeners.append(listener)
    return listener.port


def open_process_group(rank: int, num_ranks: int, meeting: Rendezvous) -> None:
    """Connect this process with the other ranks of its model; collective.

    A process on CUDA must see only its own device. All sharded models of the process use this group.
    """
    if meeting.device_kind == "cuda":
        device.rank_device(meeting.device_kind)
    dist.init_process_group(
        device.backend_of(meeting.device_kind),
        init_method=meeting.place,
        rank=rank,
        world_size=num_ranks,
        timeout=COLLECTIVE_TIMEOUT,
    )


def saving_group() -> dist.ProcessGroup:
    """A second connection of all ranks, on the host, for checkpoints: collectives in the background must not get
    between those of training. Collective."""
    group = dist.new_group(backend=device.backend_of("cpu"), timeout=COLLECTIVE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup), "every rank is a member of it"
    return group


def close_process_group() -> None:
    """Disconnect; every rank must call it."""
    dist.destroy_process_group()


def group_device_kind() -> DeviceKind:
    """The kind of device that the open process group connects."""
    return device.kind_of(dist.get_backend())


def device_mesh(plan: ParallelPlan) -> DeviceMesh:
    """The ranks as a grid for FSDP: replicas by shards, or shards alone where there is one replica."""
    if plan.num_ranks != dist.get_world_size():
        raise ConfigError(
            f"the parallel plan is for num_gpu={plan.num_ranks} ranks, but {dist.get_world_size()} are connected"
        )
    kind = group_device_kind()
    if plan.num_replicas == 1:
        return init_device_mesh(kind, (plan.fsdp_size,), mesh_dim_names=(SHARD_AXIS,))
    return init_device_mesh(kind, (plan.num_replicas, plan.fsdp_size), mesh_dim_names=(REPLICA_AXIS, SHARD_AXIS))


def sequence_group(plan: ParallelPlan) -> SequenceGroup | None:
    """The ranks that work on the same sequences as this one; ``None`` where each works alone. Collective.

    It has nothing to do with who holds which shard: the mesh for FSDP may cut the ranks in another way.
    """
    if plan.sequence_parallel_size == 1:
        return None
    shape = (plan.data_size, plan.sequence_parallel_size)
    mesh = init_device_mesh(group_device_kind(), shape, mesh_dim_names=(DATA_AXIS, SEQUENCE_AXIS))
    return SequenceGroup(mesh.get_group(SEQUENCE_AXIS), mesh.get_local_rank(SEQUENCE_AXIS), shape[1])


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over all ranks, the same on each; collective."""
    dist.all_reduce(values)
    return values


def maximum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum over all ranks, the same on each; collective."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values
