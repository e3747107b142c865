"""Checkpoints of sharded models: exact on as many ranks, correct on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from cases import Setup, Weights, exported, random_samples, scores_of, step, trainer_of
from gang import Gang
from numpy.typing import NDArray
from safetensors.torch import load_file

from chatlearn.checkpoint.hugging_face import write_hugging_face
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import FileRecord, Manifest
from chatlearn.checkpoint.sharded import Restored, load_shards, save_shards
from chatlearn.errors import CheckpointError
from chatlearn.records import Sample, StepStats
from chatlearn.trainer.policy_trainer import PolicyTrainer

ARCHITECTURES = {"tied": "Qwen3ForCausalLM", "untied": "Qwen3ForCausalLM", "moe": "Qwen3MoeForCausalLM"}
ITERATION = 2
LR = 1e-2  # large, so that a lost moment shows

Scores = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Snapshot:
    """A trainer at the moment of saving or loading, and what its next step makes of it."""

    weights: Weights
    scores: Scores
    stats: StepStats
    next_weights: Weights


def snapshot(trainer: PolicyTrainer, setup: Setup, samples: list[Sample]) -> Snapshot:
    weights, scores = exported(trainer.model), scores_of(trainer.model, setup, samples)
    return Snapshot(weights, scores, step(trainer, setup, samples), exported(trainer.model))


def train_and_save(setup: Setup, staging: Path) -> tuple[tuple[FileRecord, ...], Snapshot]:
    trainer, samples = trainer_of(setup), random_samples(6)
    for _ in range(ITERATION):
        step(trainer, setup, samples)
    scores_of(trainer.model, setup, samples)  # leaves FSDP in whatever state scoring leaves it
    files = save_shards(staging, trainer.model.module, trainer.optimizer)
    return files, snapshot(trainer, setup, samples)


def load_and_train(setup: Setup, folder: Path, num_steps_before: int) -> tuple[Restored, Snapshot]:
    trainer, samples = trainer_of(setup), random_samples(6)
    for _ in range(num_steps_before):
        step(trainer, setup, samples)
    restored = load_shards(folder, trainer.model.module, trainer.optimizer)
    return restored, snapshot(trainer, setup, samples)


def load_with_another_rate(setup: Setup, folder: Path, lr: float) -> tuple[Snapshot, Snapshot]:
    """The next step where the rate changes after the resume, and where the run was resumed with the new rate."""
    changed_later, samples = trainer_of(setup), random_samples(6)
    load_shards(folder, changed_later.model.module, changed_later.optimizer)
    changed_later.optimizer_spec = replace(changed_later.optimizer_spec, lr=lr)
    resumed = trainer_of(replace(setup, lr=lr))
    load_shards(folder, resumed.model.module, resumed.optimizer)
    return snapshot(changed_later, setup, samples), snapshot(resumed, setup, samples)


def load_damaged(setup: Setup, folder: Path) -> tuple[str, bool]:
    """The error on this rank, and whether the weights stayed as they were."""
    trainer = trainer_of(setup)
    before = exported(trainer.model)
    try:
        load_shards(folder, trainer.model.module, trainer.optimizer)
    except CheckpointError as error:
        after = exported(trainer.model)
        return str(error), all(np.array_equal(before[name], after[name]) for name in before)
    return "no error", True


def write_live(setup: Setup, base: Path, save_dir: Path) -> None:
    """``save_hf``: rank 0 writes the stream, the others take part in it."""
    model = trainer_of(setup).model
    if dist.get_rank() == 0:
        write_hugging_face(model.export_weights(), base, save_dir, "float32")
    else:
        for _ in model.export_weights():
            pass


@dataclass(frozen=True)
class Saved:
    """A published checkpoint and what the trainer that saved it went on to do."""

    setup: Setup
    folder: Path
    snapshot: Snapshot


SavedBy = Callable[[str, int], Saved]


@pytest.fixture(scope="module")
def saved_by(
    gang_of: Callable[[int], Gang], models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> SavedBy:
    """The checkpoint of a kind of model by a number of ranks, made once."""
    made: dict[tuple[str, int], Saved] = {}

    def get(kind: str, num_ranks: int) -> Saved:
        if (kind, num_ranks) not in made:
            root = tmp_path_factory.mktemp(f"{kind}_{num_ranks}") / "save_model" / "policy_trainer"
            setup = Setup(models[kind], lr=LR, temperature=1.0, grouped_experts=kind == "moe")
            answers = gang_of(num_ranks).run(train_and_save, setup, begin(root, ITERATION))
            files = tuple(record for reported, _ in answers for record in reported)
            base, groupgemm = str(models[kind]), kind == "moe"
            manifest = Manifest(ITERATION, 1, base, ARCHITECTURES[kind], groupgemm, num_ranks, files)
            made[kind, num_ranks] = Saved(setup, publish(root, manifest), answers[0][1])
        return made[kind, num_ranks]

    return get


def largest_difference(left: Weights, right: Weights) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


@pytest.mark.parametrize(("kind", "num_ranks"), [("tied", 1), ("untied", 2), ("moe", 2)])
@pytest.mark.parametrize("num_steps_before", [0, 1])
def test_the_same_number_of_ranks_goes_on_to_the_bit(
    saved_by: SavedBy, gang_of: Callable[[int], Gang], kind: str, num_ranks: int, num_steps_before: int
) -> None:
    saved = saved_by(kind, num_ranks)
    answers = gang_of(num_ranks).run(load_and_train, saved.setup, saved.folder, num_steps_before)
    for restored, here in answers:
        assert restored == Restored(num_ranks, random_states=True)
        assert largest_difference(here.weights, saved.snapshot.weights) == 0
        assert here.stats == saved.snapshot.stats
        assert largest_difference(here.next_weights, saved.snapshot.next_weights) == 0


def test_a_resume_with_another_learning_rate_trains_with_it(saved_by: SavedBy, gang_of: Callable[[int], Gang]) -> None:
    saved, lr = saved_by("moe", 2), LR / 10
    for expected, here in gang_of(2).run(load_with_another_rate, saved.setup, saved.folder, lr):
        assert here.stats == expected.stats
        assert here.stats.lr == lr
        assert largest_difference(here.next_weights, expected.next_weights) == 0
        assert largest_difference(here.next_weights, saved.snapshot.next_weights) > lr


@pytest.mark.parametrize(
    ("kind", "saving", "loading"), [("tied", 1, 2), ("untied", 2, 1), ("moe", 2, 1), ("moe", 1, 2)]
)
def test_another_number_of_ranks_takes_weights_and_moments_over(
    saved_by: SavedBy, gang_of: Callable[[int], Gang], kind: str, saving: int, loading: int
) -> None:
    saved = saved_by(kind, saving)
    for restored, here in gang_of(loading).run(load_and_train, saved.setup, saved.folder, 0):
        assert restored == Restored(saving, random_states=False)
        assert largest_difference(here.weights, saved.snapshot.weights) == 0
        assert here.stats.grad_norm == pytest.approx(saved.snapshot.stats.grad_norm, rel=1e-4)
        # Adam divides by the root of the second moment, which magnifies rounding where gradients nearly vanish.
        assert largest_difference(here.next_weights, saved.snapshot.next_weights) < 0.05 * LR
        moved = largest_difference(here.weights, here.next_weights)
        assert moved > 0.5 * LR


@pytest.mark.parametrize("changed", [{"grouped_experts": False}, {"sequence_parallel_size": 2}])
def test_experts_and_sequences_may_be_computed_in_another_way(
    saved_by: SavedBy, gang_of: Callable[[int], Gang], changed: dict[str, Any]
) -> None:
    saved = saved_by("moe", 2)
    for restored, here in gang_of(2).run(load_and_train, replace(saved.setup, **changed), saved.folder, 0):
        assert restored == Restored(2, random_states=True)
        assert largest_difference(here.weights, saved.snapshot.weights) == 0
        assert here.stats.grad_norm == pytest.approx(saved.snapshot.stats.grad_norm, rel=1e-4)
        assert largest_difference(here.next_weights, saved.snapshot.next_weights) < 0.05 * LR


def test_replicas_save_what_one_of_them_holds(saved_by: SavedBy, gang_of: Callable[[int], Gang]) -> None:
    """Two replicas of one shard each load what two shards saved."""
    saved = saved_by("moe", 2)
    replicated = Setup(saved.setup.path, lr=LR, temperature=1.0, grouped_experts=True, fsdp_size=1)
    for _, here in gang_of(2).run(load_and_train, replicated, saved.folder, 0):
        assert largest_difference(here.weights, saved.snapshot.weights) == 0


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_save_hf_writes_the_live_weights(
    saved_by: SavedBy, gang_of: Callable[[int], Gang], models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    gang_of(2).run(write_live, saved_by(kind, 2).setup, models[kind], tmp_path / "huggingface")
    stored = load_file(tmp_path / "huggingface" / "model.safetensors")
    original = load_file(models[kind] / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(bool((stored[name] == original[name]).all()) for name in stored)


def test_a_fault_that_one_rank_finds_stops_all_before_anything_changed(
    saved_by: SavedBy, gang_of: Callable[[int], Gang]
) -> None:
    saved = saved_by("untied", 2)
    shard = saved.folder / "model" / "__1_0.distcp"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
        answers = gang_of(2).run(load_damaged, saved.setup, saved.folder)
    finally:
        shard.write_bytes(content)
    assert {unchanged for _, unchanged in answers} == {True}
    for fault, _ in answers:
        assert f"{saved.folder}: model/__1_0.distcp has checksum" in fault
