"""Shells around the plain classes that train: the policy trainer and the frozen reference.

A shell receives values, builds the plain object inside its process, and forwards calls. Whatever can be tested without
Ray lives in the plain class. Heavy imports happen inside the methods: the driver imports this file too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatlearn import device
from chatlearn.cluster.engine_client import Delivery, RayEngineClient
from chatlearn.cluster.seat import Arrival, Seat, arrive, free_address, meet, meeting_place, take_seat
from chatlearn.errors import DamagedCheckpointError
from chatlearn.observability.describe import Capacity

if TYPE_CHECKING:
    from torch import Tensor

    from chatlearn.batch.pack import MicroBatch
    from chatlearn.checkpoint.sharded import Restored
    from chatlearn.cluster.fanout import Member
    from chatlearn.numerics.change import Change
    from chatlearn.records import StepStats
    from chatlearn.trainer.build import ModelSpec
    from chatlearn.trainer.objective import Objective
    from chatlearn.trainer.optimizer import OptimizerSpec
    from chatlearn.trainer.parallel import ParallelPlan, Rendezvous
    from chatlearn.trainer.residency import Residency
    from chatlearn.weights.wire import WireKind, WireMeeting


@dataclass(frozen=True)
class Luggage:
    """What moves between device and host, when roles take turns on a device."""

    weights: bool
    optimizer: bool


class TrainerWorker:
    """One rank of the policy trainer."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        take_seat(seat)

    def arrive(self) -> Arrival:
        """Tell where this process is."""
        return arrive()

    def meeting_place(self) -> str:
        """Where the ranks of the trainer can meet, if this is rank 0."""
        return meeting_place(self._seat)

    def open(
        self, meeting: Rendezvous, model: ModelSpec, plan: ParallelPlan, optimizer: OptimizerSpec, objective: Objective
    ) -> None:
        """Meet the other ranks, load the model's shards and build the optimizer."""
        from chatlearn.checkpoint.background import BackgroundSaver
        from chatlearn.trainer.parallel import saving_group
        from chatlearn.trainer.policy_trainer import PolicyTrainer
        from chatlearn.trainer.rescore import Rescorer
        from chatlearn.trainer.residency import Residency
        from chatlearn.trainer.sharded_model import ShardedModel

        meet(self._seat, meeting)
        self._model = ShardedModel.load(model, plan, trainable=True)
        self._rescorer = Rescorer(self._model, plan)
        self._trainer = PolicyTrainer(self._model, optimizer, objective)
        self._residency = Residency(self._model, self._trainer.optimizer)
        on_accelerator = self._model.device_kind != "cpu"
        self._saver = BackgroundSaver(self._seat.rank, saving_group(), on_accelerator=on_accelerator)

    def wire_meeting(self, num_engine_ranks: int) -> WireMeeting:
        """Where engines can meet this rank for a wire with connections of its own."""
        from chatlearn.weights.wire import WireMeeting

        address, port = free_address()
        return WireMeeting(address, port, num_engine_ranks)

    def connect(self, kind: WireKind, engines: Sequence[Member], meeting: WireMeeting | None, silence_s: float) -> None:
        """Build this rank's end of the wire; every rank takes part, rank 0 speaks."""
        from chatlearn.weights.sender import build_sender

        self._kind: WireKind = kind
        self._silence_s = silence_s
        self._engines = RayEngineClient(engines, silence_s)
        self._sender = build_sender(kind, self._model, self._engines, self._seat.rank, self._model.device, meeting)

    def send_weights(self, version: int) -> Delivery:
        """Stream the current weights into the engines as ``version``."""
        return Delivery(self._sender.send(version), self._engines.take_lost())

    def admit(self, engine: Member, version: int) -> None:
        """Bring the current weights, which are ``version``, to an engine that took the place of another."""
        from chatlearn.weights.sender import build_sender

        client = RayEngineClient([engine], self._silence_s)
        alone = build_sender(self._kind, self._model, client, self._seat.rank, self._model.device)
        alone.send(version)
        alone.close()
        self._engines.admit(engine)

    def reseed(self, run_seed: int, episode: int) -> None:
        """Let this rank's generators begin an episode."""
        from chatlearn.trainer.generators import seed_generators

        seed_generators(run_seed, episode, "policy_trainer", self._seat.rank)

    def step(self, micro_batches: Sequence[MicroBatch], num_loss_tokens: int, iteration: int) -> StepStats:
        """Take one optimizer step with this rank's share of a batch."""
        return self._trainer.step(micro_batches, num_loss_tokens, iteration)

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Score this rank's share of a batch with the current weights."""
        return self._model.logprobs(micro_batches)

    def changed_logprobs(self, micro_batches: Sequence[MicroBatch], change: Change) -> list[Tensor]:
        """Score it with one thing changed, to find out why the engine says otherwise."""
        return self._rescorer.logprobs(micro_batches, change)

    def forget_changes(self) -> None:
        """Give back what scoring with changes took."""
        self._rescorer.close()

    def base_logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Score it with the model that the adapter was put on."""
        return self._model.base_logprobs(micro_batches)

    def begin_save(self, staging: Path, in_background: bool) -> None:
        """Begin to write this rank's shards; a report in the staging folder tells when that is done."""
        from chatlearn.checkpoint.sharded import shard_state

        state = shard_state(self._model.module, self._trainer.optimizer)
        self._saver.begin(staging, state, in_background=in_background)

    def saving_fault(self) -> str | None:
        """Why they could not be written, if that is so."""
        return self._saver.fault()

    def load(self, checkpoint: Path) -> Restored | DamagedCheckpointError:
        """Take over the state of a published checkpoint, whatever number of ranks wrote it.

        Damage is returned and not raised: what a process raises reaches the driver as text.
        """
        from chatlearn.checkpoint.adapters import AdapterRecord
        from chatlearn.checkpoint.sharded import load_shards

        adapter = AdapterRecord.of(self._model.spec.lora, self._model.spec.path)
        try:
            return load_shards(checkpoint, self._model.module, self._trainer.optimizer, adapter)
        except DamagedCheckpointError as damage:
            return damage

    def save_capsule(self, base_dir: Path, staging: Path) -> str | None:
        """Put the weights, which rank 0 writes, and this rank's random states into a capsule; says why it cannot."""
        from chatlearn.checkpoint.capsule import fault_of, write_weights
        from chatlearn.checkpoint.sharded import save_random_states
        from chatlearn.trainer.adapter import adapter_weights

        base, adapter = self._model.export_base(as_dtype="float32"), adapter_weights(self._model.module)

        def write() -> None:
            save_random_states(staging, self._model.module)
            if self._seat.rank == 0:
                write_weights(staging, base, adapter, base_dir)

        return fault_of(write, base, adapter)

    def capacity(self) -> Capacity:
        """This rank's hardware and its part of the model's work."""
        kind = self._model.device_kind
        return Capacity(self._model.training_flops_per_token(), device.peak_flops(kind), device.peak_memory_gb(kind))

    def bring(self, what: Luggage) -> None:
        """Move weights, optimizer or both onto the device."""
        bring(self._residency, what)

    def send_home(self, what: Luggage) -> None:
        """Move them back to the host."""
        send_home(self._residency, what)

    def close(self) -> None:
        """Take leave of the other ranks."""
        from chatlearn.trainer.parallel import close_process_group

        self._saver.close()
        self._sender.close()
        close_process_group()


class ReferenceWorker:
    """One rank of the frozen reference model."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        take_seat(seat)

    def arrive(self) -> Arrival:
        """Tell where this process is."""
        return arrive()

    def meeting_place(self) -> str:
        """Where the ranks of the reference can meet, if this is rank 0."""
        return meeting_place(self._seat)

    def open(self, meeting: Rendezvous, model: ModelSpec, plan: ParallelPlan) -> None:
        """Meet the other ranks and load the model's shards."""
        from chatlearn.trainer.residency import Residency
        from chatlearn.trainer.sharded_model import ShardedModel

        meet(self._seat, meeting)
        self._model = ShardedModel.load(model, plan, trainable=False)
        self._residency = Residency(self._model)

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Score this rank's share of a batch."""
        return self._model.logprobs(micro_batches)

    def bring(self, what: Luggage) -> None:
        """Move the weights onto the device."""
        bring(self._residency, what)

    def send_home(self, what: Luggage) -> None:
        """Move them back to the host."""
        send_home(self._residency, what)

    def close(self) -> None:
        """Take leave of the other ranks."""
        from chatlearn.trainer.parallel import close_process_group

        close_process_group()


def bring(residency: Residency, what: Luggage) -> None:
    """Carry the luggage to the device."""
    if what.weights:
        residency.bring_weights()
    if what.optimizer:
        residency.bring_optimizer()


def send_home(residency: Residency, what: Luggage) -> None:
    """Carry it back."""
    if what.weights:
        residency.send_weights_home()
    if what.optimizer:
        residency.send_optimizer_home()
