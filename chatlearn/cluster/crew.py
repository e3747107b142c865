"""Opening the actors of a run: who is started where, in which order, and with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from chatlearn import device
from chatlearn.batch.plan import BatchLayout
from chatlearn.cluster.archive import Archive
from chatlearn.cluster.cluster import Cluster, Place, Troupe
from chatlearn.cluster.export_worker import ExportWorker
from chatlearn.cluster.exporter import Exporter
from chatlearn.cluster.fanout import Group, Ticket, call, collect
from chatlearn.cluster.groups import ReferenceGroup, TrainerGroup
from chatlearn.cluster.pipeline import Pipeline
from chatlearn.cluster.placement import Slot
from chatlearn.cluster.policy_group import EngineCare, PolicyGroup
from chatlearn.cluster.posts import Patience
from chatlearn.cluster.reward_group import GraderCare, RewardGroup
from chatlearn.cluster.reward_worker import RewardWorker
from chatlearn.cluster.rollout_worker import RolloutWorker
from chatlearn.cluster.weight_supply import WeightSupply, Wiring
from chatlearn.cluster.workers import Luggage, ReferenceWorker, TrainerWorker
from chatlearn.device import DeviceKind
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
    ``cores`` are those the role's threads stay on; empty means any.
    """

    slots: tuple[tuple[int, ...], ...]
    num_cpus: int
    num_threads: int
    cores: tuple[int, ...]
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
    """All roles of a run. ``takes_turns``: engines share accelerators with a model that trains or scores.

    Where ``base_is_reference``, the trainer's own base scores as the reference, and there is no model of that role.
    ``exporter`` makes Hugging Face directories, where checkpoints get them.
    """

    policy: EngineBlueprint
    trainer: TrainerBlueprint
    reference: ModelBlueprint | None
    base_is_reference: bool
    graders: GraderBlueprint
    exporter: RolePlan | None
    saves_in_background: bool
    takes_turns: bool
    device_kind: DeviceKind
    patience: Patience


@dataclass(frozen=True)
class Crew:
    """The open groups, what leads from prompts through engines and graders, and where checkpoints go."""

    pipeline: Pipeline
    policy: PolicyGroup
    trainer: TrainerGroup
    reference: ReferenceGroup | None
    graders: RewardGroup
    archive: Archive


def open_crew(cluster: Cluster, blueprint: Blueprint, tell: Callable[[str], None]) -> Crew:
    """Start every process of the run, load the models, and connect trainer and engines.

    ``tell`` says something to the person who watches, such as that an engine was replaced.
    """
    groups = _spawn(cluster, blueprint)
    engines, trainers, judges = groups["policy"], groups["policy_trainer"], groups["reward"]
    references = [group for role, group in groups.items() if role == "ref_policy"]

    def attend() -> None:
        """Whoever waits for engines may be interrupted, and checkpoints go on meanwhile."""
        cluster.heartbeat()
        archive.advance()

    def look_after() -> None:
        """While trainer and reference work, engines, graders and checkpoints are looked after."""
        pipeline.advance()
        archive.advance()

    policy = PolicyGroup(engines, cluster, _engine_care(blueprint, tell))
    graders = RewardGroup(judges, cluster, _grader_care(blueprint, tell))
    pipeline = Pipeline(policy, graders, attend)
    archive = _archive(Group(trainers.members, look_after), groups.get("exporter"), cluster, blueprint, tell)
    opening = engines.start("open", [(blueprint.policy.engine, spec) for spec in blueprint.policy.replicas])
    opening += judges.start("open", [_grading(blueprint.graders)] * len(judges.members))
    if blueprint.takes_turns:  # An engine measures how much memory is free: the trainer must not be there yet.
        collect(opening, cluster.heartbeat)
        opening = []
        policy.sleep()
    opening += _open_trainer(trainers, blueprint)
    opening += [ticket for group in references for ticket in _open_reference(group, blueprint)]
    collect(opening, cluster.heartbeat)
    if _proves(blueprint.policy):
        collect(engines.start("prove", [(spec.model_path,) for spec in blueprint.policy.replicas]), cluster.heartbeat)

    trainers, *references = [Group(group.members, look_after) for group in (trainers, *references)]
    learning = blueprint.trainer
    trainer = TrainerGroup(trainers, learning.steps, learning.sharded.scores, learning.sharded.luggage)
    supply = WeightSupply(trainers, _wiring(blueprint), learning.sharded.luggage)
    supply.connect(engines.members)
    policy.supplied_by(supply)
    reference = _reference_group(references, trainer, blueprint)
    trainer.send_home()
    if reference is not None:
        reference.send_home()
    return Crew(pipeline, policy, trainer, reference, graders, archive)


def _spawn(cluster: Cluster, blueprint: Blueprint) -> dict[str, Group]:
    """Start every process; the groups by role."""
    troupes = [
        Troupe("policy", RolloutWorker, places(cluster, blueprint.policy.plan)),
        Troupe("policy_trainer", TrainerWorker, places(cluster, blueprint.trainer.sharded.plan)),
        Troupe("reward", RewardWorker, places(cluster, blueprint.graders.plan)),
    ]
    if blueprint.reference is not None:
        troupes.append(Troupe("ref_policy", ReferenceWorker, places(cluster, blueprint.reference.plan)))
    if blueprint.exporter is not None:
        troupes.append(Troupe("exporter", ExportWorker, places(cluster, blueprint.exporter)))
    return dict(zip([troupe.role for troupe in troupes], cluster.spawn(troupes), strict=True))


def _archive(
    trainers: Group, exporters: Group | None, cluster: Cluster, blueprint: Blueprint, tell: Callable[[str], None]
) -> Archive:
    exporter = None if exporters is None else Exporter(exporters.members[0], cluster, tell)
    return Archive(trainers, exporter, tell, in_background=blueprint.saves_in_background)


def _wiring(blueprint: Blueprint) -> Wiring:
    num_ranks = sum(spec.tensor_parallel_size for spec in blueprint.policy.replicas)
    return Wiring(blueprint.policy.wire, num_ranks, blueprint.patience.silence_s)


def _engine_care(blueprint: Blueprint, tell: Callable[[str], None]) -> EngineCare:
    policy = blueprint.policy
    return EngineCare(policy.engine, policy.replicas, _proves(policy), policy.gives_way, blueprint.patience, tell)


def _proves(policy: EngineBlueprint) -> bool:
    """The proof sends from the engine's own process, which only memory of the machine allows."""
    return policy.wire == "shared_memory"


def _grader_care(blueprint: Blueprint, tell: Callable[[str], None]) -> GraderCare:
    graders = blueprint.graders
    return GraderCare(_grading(graders), graders.deadline_s, blueprint.patience, tell)


def places(cluster: Cluster, plan: RolePlan) -> list[Place]:
    """Where each process of a role goes on this cluster."""
    slots = plan.slots or ((),) * len(plan.environments)
    return [
        _place([cluster.placement.slots[number] for number in numbers], environment, plan)
        for numbers, environment in zip(slots, plan.environments, strict=True)
    ]


def _place(mine: Sequence[Slot], environment: dict[str, str], plan: RolePlan) -> Place:
    assert len({slot.bundle for slot in mine}) <= 1, "a process uses devices of one node"
    devices = [slot.device_index for slot in mine if slot.device_index is not None]
    seen = device.visible_devices(devices) if devices else {}
    return Place(mine[0] if mine else None, plan.num_cpus, plan.num_threads, plan.cores, environment | seen)


def _grading(graders: GraderBlueprint) -> tuple[str | None, float, int]:
    return graders.reward, graders.deadline_s, graders.num_processes


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
