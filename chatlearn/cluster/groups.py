"""Typed faces of the groups of actors: what the loop says to the policy, the trainer, the reference and the graders."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from chatlearn.batch.pack import TrainBatch, pack, unpack
from chatlearn.batch.plan import BatchLayout, oversized
from chatlearn.checkpoint.manifest import FileRecord
from chatlearn.checkpoint.sharded import Restored
from chatlearn.cluster.fanout import Group
from chatlearn.cluster.workers import Luggage
from chatlearn.errors import RunError
from chatlearn.numerics.change import Change
from chatlearn.observability.describe import Capacity
from chatlearn.records import FloatStream, Graded, Prompt, Rollout, Sample, StepStats
from chatlearn.rollout.dispatch import assemble, plan_dispatch
from chatlearn.rollout.engine import Finished, SamplingPlan, WakePart
from chatlearn.weights.wire import TransferStats

Progress = Callable[[int, int], None]  # done, of how many


class PolicyGroup:
    """The replicas of the rollout engine.

    ``gives_way`` says that their memory is for others between rollouts. ``interruptible`` is the same group, but
    waiting for it ends when the user asks to stop: only what is being generated may be thrown away.
    """

    def __init__(self, group: Group, interruptible: Group, gives_way: bool) -> None:
        self.group = group
        self.interruptible = interruptible
        self.gives_way = gives_way

    def rollouts(
        self, prompts: Sequence[Prompt], num_completions: int, plan: SamplingPlan, seeds: Sequence[int], show: Progress
    ) -> list[Rollout]:
        """Answer every prompt ``num_completions`` times; ``seeds`` has one entry for each replica.

        Who answers what is planned from the batch alone, so the same batch and seeds sample the same answers.
        """
        shares = plan_dispatch(prompts, num_completions, len(self.group.members))
        arguments = [(requests, replace(plan, seed=seed)) for requests, seed in zip(shares, seeds, strict=True)]
        finished: list[Finished] = []
        for parcel in self.interruptible.stream("generate", arguments):
            finished.extend(parcel)
            show(len(finished), len(prompts) * num_completions)
        return assemble(prompts, num_completions, finished)

    def wake(self, part: WakePart) -> None:
        """Take a part of the device's memory back, where it was given away."""
        if self.gives_way:
            self.group.map("wake", part)

    def sleep(self) -> None:
        """Give the device's memory to those who share it; the next transfer brings the weights again."""
        if self.gives_way:
            self.group.map("sleep")


class TrainerGroup:
    """The ranks of the policy trainer; ``steps`` and ``scores`` say how their batches are cut."""

    def __init__(self, group: Group, steps: BatchLayout, scores: BatchLayout, luggage: Luggage) -> None:
        self.group = group
        self.steps = steps
        self.scores = scores
        self.luggage = luggage

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

    def send_weights(self, version: int) -> TransferStats:
        """Stream the current weights into the engines."""
        stats: TransferStats = self.group.map("send_weights", version)[0]
        return stats

    def save(self, staging: Path) -> tuple[FileRecord, ...]:
        """Every rank writes its shards; returns what they wrote."""
        return tuple(record for records in self.group.map("save", staging) for record in records)

    def load(self, checkpoint: Path) -> Restored:
        """Every rank takes over its part of a published checkpoint."""
        restored: Restored = self.group.map("load", checkpoint)[0]
        return restored

    def save_capsule(self, base_dir: Path, staging: Path) -> None:
        """Every rank puts into a capsule what it alone has."""
        self.group.map("save_capsule", base_dir, staging)

    def save_hugging_face(self, base_dir: Path, save_dir: Path) -> None:
        """Gather and write the weights as a Hugging Face directory."""
        self.group.map("save_hugging_face", base_dir, save_dir)

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


class RewardGroup:
    """The replicas of the grader."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """Judge every completion; the answers are in the order of the rollouts."""
        num_workers = len(self.group.members)
        shares = [(list(rollouts[worker::num_workers]),) for worker in range(num_workers)]
        graded: list[list[Graded]] = self.group.each("grade", shares)
        return [graded[index % num_workers][index // num_workers] for index in range(len(rollouts))]

    def grade_gold(self, prompts: Sequence[Prompt]) -> list[str]:
        """Try the graders on gold answers; a line for each one that is not recognised."""
        num_workers = len(self.group.members)
        shares = [(list(prompts[worker::num_workers]),) for worker in range(num_workers)]
        return [line for lines in self.group.each("grade_gold", shares) for line in lines]


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
