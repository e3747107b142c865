"""Training goes on while a checkpoint is written, and the checkpoint is of the moment in which it was begun."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from cases import Setup, Weights, exported, random_samples, step, trainer_of
from gang import Gang

from chatlearn.checkpoint.background import BackgroundSaver, take_reports
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import Manifest
from chatlearn.checkpoint.sharded import load_shards, shard_state
from chatlearn.errors import CheckpointError
from chatlearn.trainer.parallel import saving_group

LR = 1e-2
WAIT_S = 60.0


@dataclass(frozen=True)
class Lived:
    """Weights at the moments of two saves, and after the step that followed the first one."""

    at_first: Weights
    after_first: Weights
    at_second: Weights


def train_through_two_saves(setup: Setup, first: Path, second: Path) -> Lived:
    """Steps follow each other at once; only rank 0's weights are looked at, and they are whole."""
    trainer, samples = trainer_of(setup), random_samples(6)
    saver = BackgroundSaver(dist.get_rank(), saving_group(), on_accelerator=False)
    step(trainer, setup, samples)
    at_first = exported(trainer.model)
    saver.begin(first, shard_state(trainer.model.module, trainer.optimizer), in_background=True)
    step(trainer, setup, samples)
    after_first = exported(trainer.model)
    step(trainer, setup, samples)
    at_second = exported(trainer.model)
    saver.begin(second, shard_state(trainer.model.module, trainer.optimizer), in_background=True)
    step(trainer, setup, samples)
    saver.close()
    assert saver.fault() is None
    return Lived(at_first, after_first, at_second)


def load_and_step(setup: Setup, folder: Path) -> tuple[Weights, Weights]:
    trainer, samples = trainer_of(setup), random_samples(6)
    load_shards(folder, trainer.model.module, trainer.optimizer)
    loaded = exported(trainer.model)
    step(trainer, setup, samples)
    return loaded, exported(trainer.model)


def fail_to_save(setup: Setup, staging: Path) -> tuple[str | None, str | None]:
    """The faults of a save in the background, and of one that is waited for."""
    trainer = trainer_of(setup)
    saver = BackgroundSaver(dist.get_rank(), saving_group(), on_accelerator=False)
    faults: list[str | None] = []
    for in_background in (True, False):
        saver.begin(staging, shard_state(trainer.model.module, trainer.optimizer), in_background=in_background)
        deadline = time.monotonic() + WAIT_S
        while saver.fault() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        faults.append(saver.fault())
    saver.close()
    return faults[0], faults[1]


def published(root: Path, iteration: int, staging: Path, setup: Setup, num_ranks: int) -> Path:
    files = take_reports(staging, num_ranks)
    assert files is not None
    return publish(
        root, Manifest(iteration, iteration, str(setup.path), "Qwen3ForCausalLM", False, num_ranks, tuple(files))
    )


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("kind", "num_ranks"), [("tied", 1), ("untied", 2), ("moe", 2)])
def test_a_checkpoint_is_of_the_moment_it_was_begun(
    gang_of: Callable[[int], Gang], models: dict[str, Path], tmp_path: Path, kind: str, num_ranks: int
) -> None:
    """Also the second one, which goes through the same memory."""
    setup = Setup(models[kind], lr=LR, temperature=1.0, grouped_experts=kind == "moe")
    gang, first, second = gang_of(num_ranks), begin(tmp_path / "a", 1), begin(tmp_path / "b", 2)
    lived = gang.run(train_through_two_saves, setup, first, second)[0]
    assert not same(lived.at_first, lived.after_first)
    assert not same(lived.at_first, lived.at_second)
    one = published(tmp_path / "a", 1, first, setup, num_ranks)
    two = published(tmp_path / "b", 2, second, setup, num_ranks)
    loaded, stepped = gang.run(load_and_step, setup, one)[0]
    assert same(loaded, lived.at_first)
    assert same(stepped, lived.after_first), "the moments are not those of the moment"
    assert same(gang.run(load_and_step, setup, two)[0][0], lived.at_second)


def test_what_cannot_be_written_is_told_by_every_rank(
    gang_of: Callable[[int], Gang], models: dict[str, Path], tmp_path: Path
) -> None:
    setup = Setup(models["untied"], lr=LR, temperature=1.0)
    staging = begin(tmp_path, 1)
    (staging / "model").write_text("in the way")
    for faults in gang_of(2).run(fail_to_save, setup, staging):
        for fault in faults:
            assert fault is not None
            assert f"{staging}/model: cannot be written" in fault
    with pytest.raises(CheckpointError, match="cannot be written"):
        take_reports(staging, 2)


def test_reports_count_when_all_are_there(tmp_path: Path) -> None:
    assert take_reports(tmp_path, 1) is None
