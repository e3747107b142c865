"""What a trainer's optimizer does must not depend on the ranks: gradients, rounded states, schedules, resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from cases import Setup, Weights, exported, random_samples, step
from gang import GangOf

from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import FileRecord, Manifest
from chatlearn.checkpoint.sharded import load_shards, save_shards
from chatlearn.records import Sample
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.schedule import Schedule
from chatlearn.trainer.sharded_model import ShardedModel

EXACT = OptimizerSpec(lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)
ROUNDED = replace(EXACT, state_dtype="bfloat16")
TWO_GROUPS = replace(ROUNDED, decay_norms_and_biases=False)
NUM_STEPS = 4


def trainer_of(setup: Setup, spec: OptimizerSpec) -> PolicyTrainer:
    return PolicyTrainer(ShardedModel.load(setup.spec(), setup.plan(), trainable=True), spec, setup.objective())


def gradients_and_step(setup: Setup, samples: list[Sample]) -> tuple[Weights, float, float, list[str]]:
    """Gradients and loss of a batch, the norm that a step on it reports, and the names of the weights."""
    trainer, batch = trainer_of(setup, EXACT), cases.mine(setup, samples)
    sums = trainer.accumulate(cases.my_share(setup, batch), batch.num_loss_tokens)
    gradients = {name: gradient.numpy().copy() for name, gradient in trainer.gradients()}
    trainer.optimizer.zero_grad()
    stats = step(trainer, setup, samples)
    assert sums.parts.loss.item() == stats.loss
    return gradients, stats.loss, stats.grad_norm, [meta.name for meta in trainer.model.metadata()]


@pytest.mark.parametrize("model", ["tied", "moe"])
def test_gradients_are_whole_named_as_stored_and_of_the_norm_that_is_reported(
    gang_of: GangOf, models: dict[str, Path], model: str
) -> None:
    setup, samples = Setup(models[model], loss="gspo", max_tokens=64), random_samples(5, with_old=True)
    ((one, loss, _, names),) = gang_of(1).run(gradients_and_step, setup, samples)
    assert list(one) == names
    whole_norm = np.sqrt(sum(float(np.square(gradient, dtype=np.float64).sum()) for gradient in one.values()))
    for gradients, loss_here, norm, _ in gang_of(2).run(gradients_and_step, setup, samples):
        assert norm == pytest.approx(whole_norm, rel=1e-6)
        assert loss_here == pytest.approx(loss, rel=1e-6)
        for name, gradient in one.items():
            scale = max(np.linalg.norm(gradient), 1e-3 * whole_norm)
            assert np.linalg.norm(gradients[name] - gradient) < 1e-5 * scale, name


def train(setup: Setup, spec: OptimizerSpec, samples: list[Sample]) -> tuple[Weights, set[torch.dtype]]:
    trainer = trainer_of(setup, spec)
    for _ in range(NUM_STEPS):
        step(trainer, setup, samples)
    dtypes = {state[name].dtype for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")}
    return exported(trainer.model), dtypes


def test_rounded_states_follow_exact_ones_and_replicas_stay_equal(gang_of: GangOf, models: dict[str, Path]) -> None:
    setup, samples = Setup(models["tied"]), random_samples(6, with_old=True)
    (exact, _), _ = gang_of(2).run(train, setup, EXACT, samples)
    start = gang_of(1).run(cases.export_untouched, setup)[0][0]
    for layout in (setup, replace(setup, fsdp_size=1)):
        (one, dtypes), (other, _) = gang_of(2).run(train, layout, ROUNDED, samples)
        assert dtypes == {torch.bfloat16}
        assert all(np.array_equal(one[name], other[name]) for name in one), "replicas must draw the same"
        way = np.sqrt(sum(np.square(exact[name] - start[name]).sum() for name in one))
        apart = np.sqrt(sum(np.square(exact[name] - one[name]).sum() for name in one))
        assert 0 < apart < 0.02 * way


def train_and_save(
    setup: Setup, spec: OptimizerSpec, samples: list[Sample], staging: Path
) -> tuple[tuple[FileRecord, ...], Weights]:
    """A checkpoint after two steps, and the weights after the third."""
    trainer = trainer_of(setup, spec)
    for _ in range(2):
        step(trainer, setup, samples)
    files = save_shards(staging, trainer.model.module, trainer.optimizer)
    step(trainer, setup, samples)
    return files, exported(trainer.model)


def load_and_train(setup: Setup, spec: OptimizerSpec, samples: list[Sample], folder: Path) -> Weights:
    trainer = trainer_of(setup, spec)
    load_shards(folder, trainer.model.module, trainer.optimizer)
    step(trainer, setup, samples)
    return exported(trainer.model)


def test_rounded_states_in_two_groups_resume_to_the_bit_and_serve_exact_ones(
    gang_of: GangOf, models: dict[str, Path], tmp_path: Path
) -> None:
    setup, samples = Setup(models["moe"]), random_samples(6, with_old=True)
    root = tmp_path / "policy_trainer"
    saved = gang_of(2).run(train_and_save, setup, TWO_GROUPS, samples, begin(root, 1))
    files, weights = tuple(record for records, _ in saved for record in records), saved[0][1]
    manifest = Manifest(1, 1, str(setup.path), "Qwen3MoeForCausalLM", groupgemm=False, num_ranks=2, files=files)
    folder = publish(root, manifest)
    for resumed in gang_of(2).run(load_and_train, setup, TWO_GROUPS, samples, folder):
        assert cases.worst_difference(resumed, weights) == 0
    wishes = replace(EXACT, lr=TWO_GROUPS.lr)
    (otherwise,) = gang_of(1).run(load_and_train, setup, wishes, samples, folder)
    assert 0 < cases.worst_difference(otherwise, weights) < 0.2 * EXACT.lr


def rates(setup: Setup, spec: OptimizerSpec, samples: list[Sample]) -> list[float]:
    """What steps report to have used; the third of them had an infinite gradient."""
    trainer, batch, stats = trainer_of(setup, spec), cases.mine(setup, samples), []
    poison = np.where(samples[0].loss_mask, np.inf, 0).astype(np.float32)
    poisoned = cases.mine(setup, [replace(samples[0], advantages=poison), *samples[1:]])
    for iteration in range(1, 6):
        taken = poisoned if iteration == 3 else batch
        stats.append(trainer.step(cases.my_share(setup, taken), taken.num_loss_tokens, iteration))
    assert [np.isfinite(one.grad_norm) for one in stats] == [True, True, False, True, True]
    return [one.lr for one in stats]


def test_a_step_uses_and_reports_the_rate_of_its_number(gang_of: GangOf, models: dict[str, Path]) -> None:
    """A step that was skipped is one of the run's all the same."""
    spec = replace(TWO_GROUPS, lr=1.0, schedule=Schedule("linear", 2, 0.25, 5))
    for found in gang_of(2).run(rates, Setup(models["tied"]), spec, random_samples(4)):
        assert found == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])
