"""Opening the actors of a run: who is started where, in which order, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chatlearn import device
from chatlearn.batch.plan import BatchLayout
from chatlearn.cluster.cluster import Cluster, Place, Troupe
from chatlearn.cluster.fanout import Group, Ticket, call, collect
from chatlearn.cluster.groups import PolicyGroup, ReferenceGroup, RewardGroup, TrainerGroup
from chatlearn.cluster.placement import Slot
from chatlearn.cluster.reward_worker import RewardWorker
from chatlearn.cluster.rollout_worker import RolloutWorker
from chatlearn.cluster.workers import Luggage, ReferenceWorker, TrainerWorker
from chatlearn.device import DeviceKind
from chatlearn.errors import RunError
from chatlearn.rollout.engine import EngineSpec
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.objective import Objective
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.parallel import ParallelPlan, Rendezvous
from chatlearn.weights.wire import WireKind


@dataclass(frozen=True)
class RolePlan:
    """Where a role's processes go, and what each gets.

    ``slots`` has the numbers of the slots of each process, the first of which it lives in; empty means anywhere.
    """

    slots: tuple[tuple[int, ...], ...]
    num_processes: int
    device_share: float
    num_cpus: int
    num_threads: int
    environments: tuple[dict[str, str], ...]  # One for each process.


@dataclass(frozen=True)
class EngineBlueprint:
    """The engines: one spec for each replica."""

    plan: RolePlan
    engine: str
    replicas: tuple[EngineSpec, ...]
    wire: WireKind
    gives_way: bool  # between rollouts, to a trainer on the same accelerators


@dataclass(frozen=True)
class ModelBlueprint:
    """A sharded model that scores."""

    plan: RolePlan
    model: ModelSpec
    parallel: ParallelPlan
    scores: BatchLayout
    luggage: Luggage  # what leaves the device while others use it


@dataclass(frozen=True)
class TrainerBlueprint:
    """A sharded model that learns."""

    sharded: ModelBlueprint
    optimizer: OptimizerSpec
    objective: Objective
    steps: BatchLayout


@dataclass(frozen=True)
class GraderBlueprint:
    """The graders: the reward function's name (``None``: by data source), and the deadline of one answer."""

    plan: RolePlan
    reward: str | None
    deadline_s: float
    num_processes: int  # of each grader


@dataclass(frozen=True)
class Blueprint:
    """All roles of a run. ``takes_turns``: engines and trainer share accelerators.

    Where ``base_is_reference``, the trainer's own base scores as the reference, and there is no model of that role.
    """

    policy: EngineBlueprint
    trainer: TrainerBlueprint
    reference: ModelBlueprint | None
    base_is_reference: bool
    graders: GraderBlueprint
    takes_turns: bool
    device_kind: DeviceKind


@dataclass(frozen=True)
class Crew:
    """The open groups."""

    policy: PolicyGroup
    trainer: TrainerGroup
    reference: ReferenceGroup | None
    graders: RewardGroup


def open_crew(cluster: Cluster, blueprint: Blueprint) -> Crew:
    """Start every process of the run, load the models, and connect trainer and engines."""
    troupes = [
        Troupe("policy", RolloutWorker, _places(cluster, blueprint.policy.plan)),
        Troupe("policy_trainer", TrainerWorker, _places(cluster, blueprint.trainer.sharded.plan)),
        Troupe("reward", RewardWorker, _places(cluster, blueprint.graders.plan)),
    ]
    if blueprint.reference is not None:
        troupes.append(Troupe("ref_policy", ReferenceWorker, _places(cluster, blueprint.reference.plan)))
    engines, trainers, graders, *references = cluster.spawn(troupes)

    policy = PolicyGroup(engines, cluster.interruptible(engines), blueprint.policy.gives_way)
    opening = engines.start("open", [(blueprint.policy.engine, spec) for spec in blueprint.policy.replicas])
    opening += graders.start("open", _grading(blueprint.graders))
    if blueprint.takes_turns:  # An engine measures how much memory is free: the trainer must not be there yet.
        collect(opening, cluster.heartbeat)
        opening = []
        policy.sleep()
    opening += _open_trainer(trainers, blueprint)
    opening += [ticket for group in references for ticket in _open_reference(group, blueprint)]
    collect(opening, cluster.heartbeat)
    if blueprint.policy.wire == "shared_memory":  # The proof itself sends from the engine's process.
        collect(engines.start("prove", [(spec.model_path,) for spec in blueprint.policy.replicas]), cluster.heartbeat)

    learning = blueprint.trainer
    trainer = TrainerGroup(trainers, learning.steps, learning.sharded.scores, learning.sharded.luggage)
    meeting = trainers.first("wire_meeting", _num_engine_ranks(blueprint.policy))
    trainers.map("connect", blueprint.policy.wire, engines.members, meeting)
    reference = _reference_group(references, trainer, blueprint)
    trainer.send_home()
    if reference is not None:
        reference.send_home()
    return Crew(policy, trainer, reference, RewardGroup(graders))


def _places(cluster: Cluster, plan: RolePlan) -> list[Place]:
    if not plan.slots:
        return [Place(None, 0.0, plan.num_cpus, plan.num_threads, environment) for environment in plan.environments]
    return [
        _place(cluster.placement.slots, numbers, environment, plan)
        for numbers, environment in zip(plan.slots, plan.environments, strict=True)
    ]


def _place(slots: Sequence[Slot], numbers: Sequence[int], environment: dict[str, str], plan: RolePlan) -> Place:
    mine = [slots[number] for number in numbers]
    if len({slot.host for slot in mine}) > 1:
        raise RunError(
            f"a process that needs {len(mine)} devices of one node was given some on {mine[0].host} and some on "
            f"{mine[-1].host}; make num_gpu of every model a multiple of the GPUs of a node"
        )
    devices = [slot.device_index for slot in mine if slot.device_index is not None]
    seen = device.visible_devices(devices) if devices else {}
    return Place(mine[0], plan.device_share, plan.num_cpus, plan.num_threads, environment | seen)


def _num_engine_ranks(policy: EngineBlueprint) -> int:
    return sum(spec.tensor_parallel_size for spec in policy.replicas)


def _grading(graders: GraderBlueprint) -> list[tuple[str | None, float, int]]:
    return [(graders.reward, graders.deadline_s, graders.num_processes)] * graders.plan.num_processes


def _open_trainer(trainers: Group, blueprint: Blueprint) -> list[Ticket]:
    learning = blueprint.trainer
    meeting = _meeting(trainers, blueprint)
    values = (meeting, learning.sharded.model, learning.sharded.parallel, learning.optimizer, learning.objective)
    return trainers.start("open", [values] * len(trainers.members))


def _open_reference(references: Group, blueprint: Blueprint) -> list[Ticket]:
    assert blueprint.reference is not None, "there is a reference group only where there is a blueprint of it"
    values = (_meeting(references, blueprint), blueprint.reference.model, blueprint.reference.parallel)
    return references.start("open", [values] * len(references.members))


def _reference_group(references: Sequence[Group], trainer: TrainerGroup, blueprint: Blueprint) -> ReferenceGroup | None:
    if blueprint.base_is_reference:
        return ReferenceGroup(trainer.group, trainer.scores, replace(trainer.luggage, optimizer=False), "base_logprobs")
    if blueprint.reference is None:
        return None
    return ReferenceGroup(references[0], blueprint.reference.scores, blueprint.reference.luggage, "logprobs")


def _meeting(group: Group, blueprint: Blueprint) -> Rendezvous:
    """Rank 0 knows where it can be met."""
    first = group.members[0]
    address = collect([(call(first, "meeting_place"), first)], group.heartbeat)[0]
    return Rendezvous(address, blueprint.device_kind)
