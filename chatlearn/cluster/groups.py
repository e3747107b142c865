"""Typed faces of the sharded models: what the loop says to the trainer and to the reference."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Literal

from chatlearn.batch.pack import TrainBatch, pack, unpack
from chatlearn.batch.plan import BatchLayout, oversized
from chatlearn.checkpoint.sharded import Restored
from chatlearn.cluster.engine_client import Delivery
from chatlearn.cluster.fanout import Group
from chatlearn.cluster.workers import Luggage
from chatlearn.errors import CheckpointError, DamagedCheckpointError, RunError
from chatlearn.numerics.change import Change
from chatlearn.observability.describe import Capacity
from chatlearn.records import FloatStream, Sample, StepStats


class TrainerGroup:
    """The ranks of the policy trainer; ``steps`` and ``scores`` say how their batches are cut.

    ``num_bad_in_a_row`` counts the last steps whose gradient was not finite, as far as this process has seen them:
    what lies in ``capsules/`` may be of an earlier life of the run.
    """

    def __init__(self, group: Group, steps: BatchLayout, scores: BatchLayout, luggage: Luggage) -> None:
        self.group = group
        self.steps = steps
        self.scores = scores
        self.luggage = luggage
        self.num_bad_in_a_row = 0

    def reseed(self, run_seed: int, episode: int) -> None:
        """Let the generators of every rank begin an episode, with numbers that follow from it alone."""
        self.group.map("reseed", run_seed, episode)

    def step(self, samples: Sequence[Sample], iteration: int) -> StepStats:
        """Take one optimizer step with these samples; ``iteration`` counts the steps of the run from 1."""
        batch = pack(samples, self.steps)
        if batch.num_loss_tokens == 0:
            raise RunError(
                f"none of the {len(samples)} answers of a batch can be learned from, because grading failed on all of "
                "them; see rule_reward/grader_errors and the logs of the reward processes"
            )
        shares = [(share, batch.num_loss_tokens, iteration) for share in _for_every_rank(batch, self.group)]
        stats: StepStats = self.group.each("step", shares)[0]
        self.num_bad_in_a_row = 0 if isfinite(stats.grad_norm) else self.num_bad_in_a_row + 1
        return stats

    def annotate(self, samples: Sequence[Sample]) -> list[Sample]:
        """Copies of the samples with ``old_logprobs`` from the current weights."""
        streams = score(self.group, samples, self.scores, "logprobs")
        return [replace(sample, old_logprobs=stream) for sample, stream in zip(samples, streams, strict=True)]

    def changed_logprobs(self, samples: Sequence[Sample], change: Change) -> list[FloatStream]:
        """The log-probability of every token, by token, with one thing changed."""
        layout = replace(self.scores, packing=False, micro_batch_size=1) if change.plain_kernels else self.scores
        return score(self.group, samples, layout, "changed_logprobs", change)

    def forget_changes(self) -> None:
        """Give back the memory that scoring with changes took."""
        self.group.map("forget_changes")

    def num_oversized(self, samples: Sequence[Sample]) -> int:
        """How many samples are longer than a micro-batch should be; each gets one of its own."""
        return len(oversized([len(sample.token_ids) for sample in samples], self.steps))

    def send_weights(self, version: int) -> Delivery:
        """Stream the current weights into the engines."""
        delivery: Delivery = self.group.map("send_weights", version)[0]
        return delivery

    def load(self, checkpoint: Path) -> Restored:
        """Every rank takes over its part of a published checkpoint; raises ``DamagedCheckpointError``."""
        restored: Restored | DamagedCheckpointError = self.group.map("load", checkpoint)[0]
        if isinstance(restored, DamagedCheckpointError):
            raise restored
        return restored

    def save_capsule(self, base_dir: Path, staging: Path) -> None:
        """Every rank puts into a capsule what it alone has; raises ``CheckpointError`` where one of them cannot."""
        faults: list[str] = [fault for fault in self.group.map("save_capsule", base_dir, staging) if fault is not None]
        if faults:
            raise CheckpointError(faults[0])

    def capacity(self) -> Capacity:
        """All ranks together; the memory is that of the rank which held most."""
        ranks: list[Capacity] = self.group.map("capacity")
        peaks = [rank.peak_flops for rank in ranks if rank.peak_flops is not None]
        return Capacity(
            flops_per_token=ranks[0].flops_per_token,
            peak_flops=sum(peaks) if len(peaks) == len(ranks) else None,
            peak_memory_gb=max(rank.peak_memory_gb for rank in ranks),
        )

    def send_home(self) -> None:
        """Leave the device to others, where they need it."""
        _send_home(self.group, self.luggage)

    @contextmanager
    def resident(self) -> Generator[None]:
        """Weights and optimizer are on the device inside, and at home outside where others need the device."""
        with _resident(self.group, self.luggage):
            yield

    @contextmanager
    def weights_resident(self) -> Generator[None]:
        """As ``resident``, for what needs no optimizer."""
        with _resident(self.group, replace(self.luggage, optimizer=False)):
            yield


class ReferenceGroup:
    """The ranks of the frozen reference model.

    ``scoring`` is what they are asked for: a trainer of an adapter is a reference too, with the adapter off.
    """

    def __init__(
        self, group: Group, scores: BatchLayout, luggage: Luggage, scoring: Literal["logprobs", "base_logprobs"]
    ) -> None:
        self.group = group
        self.scores = scores
        self.luggage = luggage
        self.scoring = scoring

    def annotate(self, samples: Sequence[Sample]) -> list[Sample]:
        """Copies of the samples with ``ref_logprobs``."""
        streams = score(self.group, samples, self.scores, self.scoring)
        return [replace(sample, ref_logprobs=stream) for sample, stream in zip(samples, streams, strict=True)]

    def send_home(self) -> None:
        """Leave the device to others, where they need it."""
        _send_home(self.group, self.luggage)

    @contextmanager
    def resident(self) -> Generator[None]:
        """Weights are on the device inside, and at home outside where others need the device."""
        with _resident(self.group, self.luggage):
            yield


def score(
    group: Group, samples: Sequence[Sample], layout: BatchLayout, verb: str, *wishes: object
) -> list[FloatStream]:
    """Ask the group's model for the log-probabilities of every sample's tokens, one stream by token for each."""
    batch = pack(samples, layout)
    values = group.each(verb, [(micro_batches, *wishes) for micro_batches in _for_every_rank(batch, group)])
    return unpack(batch, values[:: len(values) // len(batch.ranks)])  # Ranks that share a sequence answer alike.


def _for_every_rank(batch: TrainBatch, group: Group) -> list[object]:
    """Ranks that share a sequence (sequence parallelism) receive the same micro-batches."""
    ranks_per_share = len(group.members) // len(batch.ranks)
    return [micro_batches for micro_batches in batch.ranks for _ in range(ranks_per_share)]


@contextmanager
def _resident(group: Group, luggage: Luggage) -> Generator[None]:
    """No ``finally``: an error ends the run, and asking broken ranks to tidy up would only hide it."""
    if luggage.weights or luggage.optimizer:
        group.map("bring", luggage)
    yield
    _send_home(group, luggage)


def _send_home(group: Group, luggage: Luggage) -> None:
    if luggage.weights or luggage.optimizer:
        group.map("send_home", luggage)
