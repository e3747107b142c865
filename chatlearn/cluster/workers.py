"""Ray actors: thin shells around the plain classes that train, sample and judge.

A shell receives values, builds the plain object inside its process, and forwards calls. Whatever can be tested without
Ray lives in the plain class. Heavy imports happen inside the methods: the driver imports this file too.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from chatlearn import device
from chatlearn.cluster.engine_client import RayEngineClient
from chatlearn.observability.describe import Capacity

if TYPE_CHECKING:
    from torch import Tensor

    from chatlearn.batch.pack import MicroBatch
    from chatlearn.checkpoint.manifest import FileRecord
    from chatlearn.checkpoint.sharded import Restored
    from chatlearn.cluster.fanout import Member
    from chatlearn.numerics.change import Change
    from chatlearn.records import Graded, Prompt, Rollout, StepStats
    from chatlearn.rollout.engine import EngineSpec, Finished, Request, SamplingPlan, WakePart
    from chatlearn.trainer.build import ModelSpec
    from chatlearn.trainer.objective import Objective
    from chatlearn.trainer.optimizer import OptimizerSpec
    from chatlearn.trainer.parallel import ParallelPlan, Rendezvous
    from chatlearn.trainer.residency import Residency
    from chatlearn.weights.wire import TransferMessage, TransferStats, WireKind, WireMeeting

STREAM_EVERY_S = 0.25  # Completions travel to the driver in parcels of this much time: soon, but not one by one.


@dataclass(frozen=True)
class Seat:
    """Where a worker sits: what it is called, its share of the cores, and the file that keeps what it writes.

    ``one_host`` says that the whole run is on this machine, and needs to be reached by no other.
    """

    role: str
    rank: int
    num_ranks: int
    num_threads: int
    log_file: str
    one_host: bool


@dataclass(frozen=True)
class Luggage:
    """What moves between device and host, when roles take turns on a device."""

    weights: bool
    optimizer: bool


@dataclass(frozen=True)
class Arrival:
    """What a worker says of itself when it is up."""

    host: str
    pid: int


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
        from chatlearn.trainer.policy_trainer import PolicyTrainer
        from chatlearn.trainer.rescore import Rescorer
        from chatlearn.trainer.residency import Residency
        from chatlearn.trainer.sharded_model import ShardedModel

        meet(self._seat, meeting)
        self._model = ShardedModel.load(model, plan, trainable=True)
        self._rescorer = Rescorer(self._model, plan)
        self._trainer = PolicyTrainer(self._model, optimizer, objective)
        self._residency = Residency(self._model, self._trainer.optimizer)

    def wire_meeting(self, num_engine_ranks: int) -> WireMeeting:
        """Where engines can meet this rank for a wire with connections of its own."""
        from chatlearn.weights.wire import WireMeeting

        address, port = free_address()
        return WireMeeting(address, port, num_engine_ranks)

    def connect(self, kind: WireKind, engines: Sequence[Member], meeting: WireMeeting | None) -> None:
        """Build this rank's end of the wire; every rank takes part, rank 0 speaks."""
        from chatlearn.weights.sender import build_sender

        self._sender = build_sender(kind, self._model, RayEngineClient(engines), self._seat.rank, meeting)

    def send_weights(self, version: int) -> TransferStats:
        """Stream the current weights into the engines as ``version``."""
        return self._sender.send(version)

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

    def save(self, staging: Path) -> tuple[FileRecord, ...]:
        """Write this rank's shards and say which files they are."""
        from chatlearn.checkpoint.sharded import save_shards

        return save_shards(staging, self._model.module, self._trainer.optimizer)

    def load(self, checkpoint: Path) -> Restored:
        """Take over the state of a published checkpoint, whatever number of ranks wrote it."""
        from chatlearn.checkpoint.adapters import AdapterRecord
        from chatlearn.checkpoint.sharded import load_shards

        adapter = AdapterRecord.of(self._model.spec.lora, self._model.spec.path)
        return load_shards(checkpoint, self._model.module, self._trainer.optimizer, adapter)

    def save_capsule(self, base_dir: Path, staging: Path) -> None:
        """Put the weights, which rank 0 writes, and this rank's random states into a capsule."""
        from chatlearn.checkpoint.capsule import walk, write_weights
        from chatlearn.checkpoint.sharded import save_random_states
        from chatlearn.trainer.adapter import adapter_weights

        save_random_states(staging, self._model.module)
        base, adapter = self._model.export_base(as_dtype="float32"), adapter_weights(self._model.module)
        if self._seat.rank == 0:
            write_weights(staging, base, adapter, base_dir)
        else:
            walk(base, adapter)

    def save_hugging_face(self, base_dir: Path, save_dir: Path) -> None:
        """Gather the weights (every rank takes part) and write them as a Hugging Face directory on rank 0."""
        from chatlearn.checkpoint.hugging_face import write_hugging_face

        weights = self._model.export_weights()
        if self._seat.rank == 0:
            write_hugging_face(weights, base_dir, save_dir)
        else:
            for _ in weights:  # The gather is a collective: every rank walks the whole stream.
                pass

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


class RolloutWorker:
    """One replica of the rollout engine."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        take_seat(seat)

    def arrive(self) -> Arrival:
        """Tell where this process is."""
        return arrive()

    def open(self, engine: str, spec: EngineSpec) -> None:
        """Start the engine called ``engine``."""
        from chatlearn.rollout.engine import build_engine

        self._engine = build_engine(engine, spec)

    def prove(self, model_path: str) -> None:
        """Show that weights sent to this engine are the weights it samples from; raise when they are not."""
        from chatlearn.rollout.prove import prove_weight_transfer

        prove_weight_transfer(self._engine, model_path)

    def generate(self, requests: Sequence[Request], plan: SamplingPlan) -> Iterator[list[Finished]]:
        """Answer the requests; what finishes goes out in parcels as time passes."""
        self._engine.submit(requests, plan)
        parcel: list[Finished] = []
        sent = time.monotonic()
        for finished in self._engine.completions():
            parcel.append(finished)
            if time.monotonic() - sent > STREAM_EVERY_S:
                yield parcel
                parcel, sent = [], time.monotonic()
        if parcel:
            yield parcel

    def load_weights(self, message: TransferMessage) -> None:
        """Take part in a weight transfer."""
        self._engine.load_weights(message)

    def wake(self, part: WakePart) -> None:
        """Take a part of the device's memory back."""
        self._engine.wake(part)

    def sleep(self) -> None:
        """Give the device's memory away."""
        self._engine.sleep()

    def close(self) -> None:
        """Stop the engine and its processes."""
        self._engine.close()


class RewardWorker:
    """One replica of the grader."""

    def __init__(self, seat: Seat) -> None:
        take_seat(seat)

    def arrive(self) -> Arrival:
        """Tell where this process is."""
        return arrive()

    def open(self, reward: str | None, deadline_s: float, num_processes: int) -> None:
        """Build the grader here, with its own processes."""
        from chatlearn.reward.grade import Grader

        self._grader = Grader(reward, deadline_s, num_processes)

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """Judge every completion."""
        return self._grader.grade(rollouts)

    def grade_gold(self, prompts: Sequence[Prompt]) -> list[str]:
        """Try the grader on the gold answers themselves; return a line for each one it cannot grade."""
        return self._grader.grade_gold(prompts)

    def close(self) -> None:
        """Stop the grading processes."""
        self._grader.close()


def take_seat(seat: Seat) -> None:
    """Send everything this process writes to its log file, and take the share of the cores it was given."""
    Path(seat.log_file).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(seat.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    device.set_num_threads(seat.num_threads)


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


def arrive() -> Arrival:
    """Look around in this process."""
    return Arrival(socket.gethostname(), os.getpid())


def meeting_place(seat: Seat) -> str:
    """Where the ranks of this worker's role can find each other, as torch's ``init_method``.

    On one machine that is a file, because torch's TCP store would listen on every network of the machine.
    """
    if seat.one_host:
        return f"file://{Path(seat.log_file).with_suffix('')}_meeting_{os.getpid()}"
    address, port = free_address()
    return f"tcp://{address}:{port}"


def free_address() -> tuple[str, int]:
    """This node's address in the cluster, and a port that was free there a moment ago."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def meet(seat: Seat, meeting: Rendezvous) -> None:
    """Join the process group of this worker's role."""
    from chatlearn.trainer.parallel import open_process_group

    open_process_group(seat.rank, seat.num_ranks, meeting)
