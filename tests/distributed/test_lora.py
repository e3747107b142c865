"""An adapter trains the same however the run is laid out, leaves the base alone, and comes back from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import Setup, Weights, exported, mine, my_share, random_samples, scores_of, step, trainer_of
from gang import GangOf
from numpy.typing import NDArray
from safetensors.torch import load_file

from chatlearn.batch.pack import unpack
from chatlearn.checkpoint.adapters import AdapterRecord
from chatlearn.checkpoint.convert import convert
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import FileRecord, Manifest
from chatlearn.checkpoint.sharded import Restored, load_shards, save_shards
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.models.lora import LoraSpec, is_adapter
from chatlearn.records import Sample, StepStats
from chatlearn.trainer.adapter import adapter_weights, load_adapter
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.sharded_model import ShardedModel

GRADIENTS = 1e-5
LOGPROBS = 1e-5
LR = 1e-2  # large, so that the adapter matters after a step or two
ITERATION = 2

Scores = list[NDArray[np.float32]]


@dataclass(frozen=True)
class LoraSetup(Setup):
    """A setup that trains an adapter."""

    lora: LoraSpec = LoraSpec(rank=3, alpha=6.0)
    on_host: bool = False

    def spec(self) -> ModelSpec:
        return replace(super().spec(), lora=self.lora, on_host=self.on_host)

    def record(self) -> AdapterRecord | None:
        return AdapterRecord.of(self.lora, self.path)


def lora_setup(path: Path, **changes: object) -> LoraSetup:
    return replace(LoraSetup(path, lr=LR, temperature=1.0, kl_coef=0.1, entropy_coef=0.01), **changes)


def trained_a_little(setup: LoraSetup) -> PolicyTrainer:
    """A trainer whose adapter is not zero any more: that of a new one gives no gradient to ``A``."""
    trainer = trainer_of(setup)
    with torch.no_grad():
        kept = {
            name: torch.randn(factor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2
            for name, factor in adapter_weights(trainer.model.module)
        }
    load_adapter(trainer.model.module, kept)
    return trainer


def gradients_of(setup: LoraSetup, samples: list[Sample]) -> tuple[float, Weights]:
    """Loss and every gradient of one batch."""
    trainer = trained_a_little(setup)
    batch = mine(setup, samples)
    sums = trainer.accumulate(my_share(setup, batch), batch.num_loss_tokens)
    return sums.parts.loss.item(), {name: gradient.numpy().copy() for name, gradient in trainer.gradients()}


def worst_gradient(left: Weights, right: Weights) -> float:
    """The largest relative difference of a gradient, where small ones are compared with the whole."""
    assert left.keys() == right.keys()
    whole = np.sqrt(sum(float((gradient.astype(np.float64) ** 2).sum()) for gradient in left.values()))
    return max(
        float(np.linalg.norm(left[name] - right[name]) / max(np.linalg.norm(left[name]), 1e-3 * whole)) for name in left
    )


# For each kind of model: what is varied, over how many ranks.
VARIANTS: dict[str, list[tuple[int, dict[str, object]]]] = {
    "tied": [
        (2, {"meta_init": True, "max_tokens": 64}),
        (2, {"whole_below_bytes": 0, "checkpointing": "off"}),
        (1, {"checkpointing": "off", "packing": False}),
        (2, {"fsdp_size": 1, "checkpointing": "selective"}),
        (2, {"sequence_parallel_size": 2}),
    ],
    "moe": [
        (2, {"meta_init": True, "grouped_experts": True}),
        (2, {"on_host": True, "max_tokens": 64}),
        (2, {"sequence_parallel_size": 2, "whole_below_bytes": 0}),
    ],
}


@pytest.mark.parametrize("model", VARIANTS)
def test_the_adapters_gradient_does_not_depend_on_layout(gang_of: GangOf, models: dict[str, Path], model: str) -> None:
    setup, samples = lora_setup(models[model]), random_samples(8, with_old=True, with_ref=True)
    expected_loss, expected = gang_of(1).run(gradients_of, setup, samples)[0]
    assert all(is_adapter(name) and np.linalg.norm(gradient) > 0 for name, gradient in expected.items())
    assert len(expected) == 2 * 2 * (7 if model == "tied" else 4), "two factors, two blocks; experts have none"
    for num_ranks, changes in VARIANTS[model]:
        for loss, gradients in gang_of(num_ranks).run(gradients_of, replace(setup, **changes), samples):
            assert loss == pytest.approx(expected_loss, rel=GRADIENTS), changes
            assert worst_gradient(expected, gradients) < GRADIENTS, changes


@dataclass(frozen=True)
class Course:
    """Scores of the adapted model and of its base before and after two steps, and what left the trainer at the end."""

    before: Scores
    after: Scores
    base_after: Scores
    merged: Weights
    base: Weights
    moved: float
    grad_norm_after_scoring: float


def base_scores_of(model: ShardedModel, setup: Setup, samples: list[Sample]) -> Scores:
    batch = mine(setup, samples)
    gathered: list[list[torch.Tensor]] = [[] for _ in batch.ranks]
    dist.all_gather_object(gathered, model.base_logprobs(my_share(setup, batch)))
    return unpack(batch, gathered)


def course_of(setup: LoraSetup, samples: list[Sample]) -> Course:
    trainer = trainer_of(setup)
    model = trainer.model
    base_scores_of(model, setup, samples)  # the very first forward is without the adapter; it must still be trained
    before = scores_of(model, setup, samples)
    first = dict(adapter_weights(model.module))
    for _ in range(2):
        step(trainer, setup, samples)
    last = dict(adapter_weights(model.module))
    merged = exported(model)
    base = {name: weight.float().numpy().copy() for name, weight in model.export_base()}
    assert [(meta.name, meta.shape) for meta in model.metadata()] == [(name, w.shape) for name, w in merged.items()]
    return Course(
        before=before,
        after=scores_of(model, setup, samples),
        base_after=base_scores_of(model, setup, samples),
        merged=merged,
        base=base,
        moved=min(float((last[name] - first[name]).abs().max()) for name in first),
        grad_norm_after_scoring=step(trainer, setup, samples).grad_norm,
    )


def largest(left: Scores, right: Scores) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("model", ["qwen2", "untied", "moe"])
def test_merged_weights_score_as_the_adapted_model_and_the_base_stays(
    gang_of: GangOf, models: dict[str, Path], model: str
) -> None:
    samples = random_samples(6)
    setup = lora_setup(models[model])
    untrained = gang_of(1).run(cases.transformers_scores, setup.path, samples, 1.0)[0]
    for course in gang_of(2).run(course_of, setup, samples):
        assert largest(course.before, untrained) < LOGPROBS, "a new adapter changes nothing"
        assert course.moved > LR / 10
        merged = gang_of(1).run(cases.scores_of_weights, setup.path, course.merged, samples, 1.0)[0]
        assert largest(course.after, merged) < LOGPROBS
        assert largest(course.after, untrained) > 1e-2, "the test is to train something"
        assert largest(course.base_after, untrained) < LOGPROBS
        assert np.isfinite(course.grad_norm_after_scoring)
        assert course.grad_norm_after_scoring > 0
        files = [load_file(file) for file in setup.path.glob("*.safetensors")]
        stored = {name: weight.numpy() for file in files for name, weight in file.items()}
        assert cases.worst_difference(course.base, stored) == 0


def first_adapter(setup: LoraSetup) -> Weights:
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    return {name: factor.numpy() for name, factor in adapter_weights(model.module)}


def dtypes_of(setup: LoraSetup) -> tuple[set[torch.dtype], set[torch.dtype], set[torch.dtype], float]:
    trainer = trainer_of(setup)
    norm = step(trainer, setup, random_samples(6)).grad_norm
    parameters = dict(trainer.model.module.named_parameters())
    return (
        {parameter.dtype for name, parameter in parameters.items() if is_adapter(name)},
        {parameter.dtype for name, parameter in parameters.items() if not is_adapter(name)},
        {weight.dtype for _, weight in trainer.model.export_weights()},
        norm,
    )


def test_first_values_do_not_depend_on_ranks_or_initialisation(gang_of: GangOf, models: dict[str, Path]) -> None:
    setup = lora_setup(models["tied"])
    expected = gang_of(1).run(first_adapter, setup)[0]
    for num_ranks, changes in ((2, {"meta_init": True}), (2, {})):
        for found in gang_of(num_ranks).run(first_adapter, replace(setup, **changes)):
            assert cases.worst_difference(found, expected) == 0
    starts = [value for name, value in expected.items() if "lora_A" in name]
    assert all(np.abs(value).max() > 0.1 for value in starts)
    assert len({float(value[0, 0]) for value in starts}) == len(starts), "no two layers start alike"


def test_a_half_precision_base_carries_a_single_precision_adapter(gang_of: GangOf, models: dict[str, Path]) -> None:
    single = gang_of(2).run(dtypes_of, lora_setup(models["tied"]))[0]
    half = gang_of(2).run(dtypes_of, lora_setup(models["tied"], compute_dtype="bfloat16"))[0]
    assert half[:3] == ({torch.float32}, {torch.bfloat16}, {torch.bfloat16})
    assert half[3] == pytest.approx(single[3], rel=0.1)


@dataclass(frozen=True)
class Snapshot:
    """A trainer at the moment of saving or loading, and what its next step makes of it."""

    adapter: Weights
    scores: Scores
    stats: StepStats
    next_adapter: Weights


def snapshot(trainer: PolicyTrainer, setup: Setup, samples: list[Sample]) -> Snapshot:
    module = trainer.model.module
    adapter = {name: factor.numpy().copy() for name, factor in adapter_weights(module)}
    scores, stats = scores_of(trainer.model, setup, samples), step(trainer, setup, samples)
    return Snapshot(adapter, scores, stats, {name: factor.numpy().copy() for name, factor in adapter_weights(module)})


def train_and_save(setup: LoraSetup, staging: Path) -> tuple[tuple[FileRecord, ...], Snapshot]:
    trainer, samples = trainer_of(setup), random_samples(6)
    for _ in range(ITERATION):
        step(trainer, setup, samples)
    files = save_shards(staging, trainer.model.module, trainer.optimizer)
    return files, snapshot(trainer, setup, samples)


def load_and_train(setup: LoraSetup, folder: Path) -> tuple[Restored, Snapshot]:
    trainer, samples = trainer_of(setup), random_samples(6)
    restored = load_shards(folder, trainer.model.module, trainer.optimizer, setup.record())
    return restored, snapshot(trainer, setup, samples)


def load_refused(setup: LoraSetup, folder: Path) -> tuple[str, bool]:
    """The error on this rank, and whether the weights stayed as they were."""
    trainer = trainer_of(setup)
    before = exported(trainer.model)
    try:
        load_shards(folder, trainer.model.module, trainer.optimizer, setup.record())
    except CheckpointError as error:
        return str(error), cases.worst_difference(before, exported(trainer.model)) == 0
    return "no error", True


@dataclass(frozen=True)
class Saved:
    """A published checkpoint and what the trainer that saved it went on to do."""

    setup: LoraSetup
    folder: Path
    snapshot: Snapshot


SavedBy = Callable[[str], Saved]


@pytest.fixture(scope="module")
def saved_by(gang_of: GangOf, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> SavedBy:
    """The checkpoint of an adapter on a kind of model by two ranks, made once."""
    made: dict[str, Saved] = {}

    def get(kind: str) -> Saved:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind) / "save_model" / "policy_trainer"
            setup = lora_setup(models[kind])
            answers = gang_of(2).run(train_and_save, setup, begin(root, ITERATION))
            files = tuple(record for reported, _ in answers for record in reported)
            architecture = "Qwen3MoeForCausalLM" if kind == "moe" else "Qwen3ForCausalLM"
            manifest = Manifest(ITERATION, 1, str(models[kind]), architecture, False, 2, files, adapter=setup.record())
            made[kind] = Saved(setup, publish(root, manifest), answers[0][1])
        return made[kind]

    return get


@pytest.mark.parametrize(("kind", "num_ranks"), [("tied", 2), ("tied", 1), ("moe", 2)])
def test_a_resumed_adapter_goes_on_as_if_nothing_had_happened(
    saved_by: SavedBy, gang_of: GangOf, kind: str, num_ranks: int
) -> None:
    saved = saved_by(kind)
    for restored, here in gang_of(num_ranks).run(load_and_train, saved.setup, saved.folder):
        assert restored == Restored(2, random_states=num_ranks == 2)
        assert cases.worst_difference(here.adapter, saved.snapshot.adapter) == 0
        tolerance = 0 if num_ranks == 2 else 0.05 * LR
        assert here.stats.grad_norm == pytest.approx(saved.snapshot.stats.grad_norm, rel=1e-4)
        assert cases.worst_difference(here.next_adapter, saved.snapshot.next_adapter) <= tolerance
        assert cases.worst_difference(here.adapter, here.next_adapter) > 0.5 * LR


def test_only_what_is_trained_is_saved(saved_by: SavedBy) -> None:
    folder = saved_by("tied").folder
    num_numbers = sum(factor.size for factor in saved_by("tied").snapshot.adapter.values())
    shards = {
        name: sum(file.stat().st_size for file in (folder / name).glob("*.distcp")) for name in ("model", "optimizer")
    }
    # torch.save wraps every tensor in a zip of about 1.5 KiB.
    assert 4 * num_numbers < shards["model"] < 4 * num_numbers + 28 * 2 * 2048
    assert 8 * num_numbers < shards["optimizer"] < 8 * num_numbers + 28 * 5 * 2048


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lora": None}, "an adapter with lora.rank=3 and lora.alpha=6, but .* asks for a fully trained model"),
        ({"lora": LoraSpec(4, 6.0)}, "lora.rank=3 and lora.alpha=6, but .* lora.rank=4 and lora.alpha=6"),
        ({"lora": LoraSpec(3, 12.0)}, "asks for an adapter with lora.rank=3 and lora.alpha=12"),
        (
            {"lora": LoraSpec(3, 6.0, ("q_proj",))},
            "target_modules .* is 'model.layers.0.mlp.down_proj",
        ),
    ],
)
def test_another_kind_of_adapter_is_refused_before_anything_changed(
    saved_by: SavedBy, gang_of: GangOf, changes: dict[str, object], complaint: str
) -> None:
    saved = saved_by("tied")
    for message, unchanged in gang_of(2).run(load_refused, replace(saved.setup, **changes), saved.folder):
        assert re.search(complaint, message), message
        assert unchanged


def test_names_of_all_layers_are_the_default(saved_by: SavedBy, gang_of: GangOf) -> None:
    saved = saved_by("moe")
    spelled = replace(saved.setup, lora=LoraSpec(3, 6.0, ("v_proj", "q_proj", "o_proj", "k_proj")))
    (_, here), _ = gang_of(2).run(load_and_train, spelled, saved.folder)
    assert cases.worst_difference(here.next_adapter, saved.snapshot.next_adapter) == 0


def test_an_adapter_for_another_base_is_refused(
    saved_by: SavedBy, gang_of: GangOf, models: dict[str, Path], tmp_path: Path
) -> None:
    saved = saved_by("tied")
    other = gang_of(1).run(write_moved_copy, models["tied"], tmp_path / "moved")[0]
    for message, unchanged in gang_of(2).run(load_refused, replace(saved.setup, path=other), saved.folder):
        assert f"was trained on the model that was in {models['tied']}" in message
        assert unchanged
    with pytest.raises(ConfigError, match=rf"--hf_dir {other}: its weights are not those .*{models['tied']}"):
        convert(other, saved.folder.parent, tmp_path / "huggingface", ITERATION, groupgemm=False)
    assert not (tmp_path / "huggingface").exists()


def write_moved_copy(path: Path, target: Path) -> Path:
    """A model of the same configuration with other numbers."""
    model = cases.transformers_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_a_converted_adapter_scores_as_the_trainer_did(
    saved_by: SavedBy, models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    saved = saved_by(kind)
    report = convert(
        models[kind], saved.folder.parent, tmp_path / "huggingface", ITERATION, groupgemm=False, dtype="float32"
    )
    assert report.notes == ()
    converted = cases.transformers_scores(tmp_path / "huggingface", random_samples(6), 1.0)
    assert largest(converted, saved.snapshot.scores) < LOGPROBS
    untrained = cases.transformers_scores(models[kind], random_samples(6), 1.0)
    assert largest(converted, untrained) > 1e-2
