"""A recorded step gives the same numbers when it is replayed, in every way; and a fault is found and named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cases import random_samples
from gang import Gang, GangOf
from replay_cases import RecordedSetup, loss_of_the_split, record_second_step, refusal

from chatlearn.checkpoint.capsule import CapsuleFacts, begin_capsule, publish_capsule, read_capsule
from chatlearn.config.read import read_config
from chatlearn.config.text import resolved_text
from chatlearn.models.lora import LoraSpec
from chatlearn.records import StepStats
from chatlearn.replay.comparison import climb, open_yardstick
from chatlearn.replay.difference import SAME_NUMBERS
from chatlearn.replay.ladder import ladder
from chatlearn.replay.measure import measure
from chatlearn.replay.trial import trial_of

ROOT = Path(__file__).resolve().parents[2]
ITERATION = 2
RELATIVE = 1e-5
# What a step reports that a replay can know.
COMPARED = ("loss", "pg_loss", "kl_loss", "entropy", "grad_norm", "num_tokens", "num_loss_tokens", "rollout_kl")

# What must be the same whatever the model; where a model has more to vary, it is added.
LADDER = [
    "packing off, micro-batch 1", "packing off, micro-batch 3", "checkpointing selective", "checkpointing full",
    "meta initialisation", "2 ranks", "4 ranks", "sequence parallel 2", "sequence parallel 4", "2 replicas of 2 shards",
]  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """A capsule on disk and what the recorded step reported."""

    folder: Path
    stats: StepStats


Record = Callable[..., Recording]


@pytest.fixture(scope="module")
def record(gang_of: GangOf, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Let two ranks train a model and record their second step."""

    def make(model: str, lora: LoraSpec | None = None, **changes: object) -> Recording:
        root = tmp_path_factory.mktemp("capsules")
        setup = replace(RecordedSetup(models[model], kl_coef=0.1, lora=lora, lr=1e-3), **changes)
        samples = random_samples(9, with_old=True, with_ref=True)
        stats = gang_of(2).run(record_second_step, setup, samples, begin_capsule(root, ITERATION))[0]
        words = [
            f"models.policy_trainer.load={setup.path}",
            "models.policy_trainer.kl_coef=0.1",
            "models.policy_trainer.final_clip_ratio=3.0",
            f"models.policy.temperature={setup.temperature}",
        ]
        if lora is not None:
            words += [f"models.policy_trainer.lora.rank={lora.rank}", f"models.policy_trainer.lora.alpha={lora.alpha}"]
        config = read_config(ROOT / "template" / "quickstart.yaml", words)
        facts = CapsuleFacts(ITERATION, episode=1, reason="interval", num_ranks=2, stats=stats)
        return Recording(publish_capsule(root, facts, samples, resolved_text(config)), stats)

    return make


@pytest.fixture(scope="module")
def mixture(record: Record) -> Recording:
    return record("moe")


@dataclass(frozen=True)
class FirstAnswer:
    """A gang where replay expects ranks of its own."""

    gang: Gang

    def run(self, task: Callable[..., object], *arguments: object) -> object:
        return self.gang.run(task, *arguments)[0]


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_replay_repeats_the_step_on_any_number_of_ranks(gang_of: GangOf, mixture: Recording, num_ranks: int) -> None:
    trial = trial_of(read_capsule(mixture.folder), (), num_ranks)
    for measured in gang_of(num_ranks).run(measure, trial):
        for name in COMPARED:
            assert vars(measured)[name] == pytest.approx(vars(mixture.stats)[name], rel=RELATIVE, abs=1e-7), name
        assert measured.num_ranks == num_ranks


def test_a_replay_of_an_adapter_takes_its_gradient(gang_of: GangOf, record: Record, tmp_path: Path) -> None:
    recording = record("untied", LoraSpec(rank=3, alpha=6.0), lr=1e-2)
    capsule = read_capsule(recording.folder)
    assert capsule.adapter_file is not None
    steps = ladder(trial_of(capsule, (), 1), num_devices=None)
    yardstick = open_yardstick(FirstAnswer(gang_of(1)), steps, capsule.samples, tmp_path)
    assert yardstick.base.loss == pytest.approx(recording.stats.loss, rel=RELATIVE)
    assert yardstick.base.grad_norm == pytest.approx(recording.stats.grad_norm, rel=RELATIVE)
    (rung,) = (rung for rung in steps.variants if rung.name == "sequence parallel 2")
    difference = yardstick.hold(FirstAnswer(gang_of(2)), rung, SAME_NUMBERS)
    assert difference.within(SAME_NUMBERS.tolerance), difference
    assert ".lora_" in difference.worst, "the base has no gradient"
    (said,) = gang_of(1).run(refusal, trial_of(capsule, ["models.policy_trainer.lora.rank=2"], 1))
    assert "models.policy_trainer.lora: " in said
    assert "was kept with shape (3, " in said


def test_master_weights_are_recorded_in_full(gang_of: GangOf, record: Record) -> None:
    """A trainer that computes in bfloat16 has float32 masters; rounded ones would give another gradient."""
    recording = record("tied", compute_dtype="bfloat16")
    trial = trial_of(read_capsule(recording.folder), (), 2)
    rounded = replace(trial, model=replace(trial.model, compute_dtype="bfloat16"))
    measured = gang_of(2).run(measure, rounded)[0]
    assert measured.loss == recording.stats.loss
    assert measured.grad_norm == recording.stats.grad_norm


def test_a_step_that_is_not_finite_names_its_parameters(gang_of: GangOf, mixture: Recording) -> None:
    trial = trial_of(read_capsule(mixture.folder), (), 1)
    poisoned = replace(trial, objective=replace(trial.objective, kl_coef=float("inf")))
    measured = gang_of(1).run(measure, poisoned)[0]
    assert "model.norm.weight" in measured.not_finite


def test_the_ladder_holds(gang_of: GangOf, mixture: Recording, tmp_path: Path) -> None:
    """All ways, over a mixture of experts, which has the most of them."""
    capsule = read_capsule(mixture.folder)
    steps = ladder(trial_of(capsule, (), 1), num_devices=None)
    assert [rung.name for rung in steps.variants] == [*LADDER[:5], "grouped experts", *LADDER[5:]]
    yardstick = open_yardstick(FirstAnswer(gang_of(1)), steps, capsule.samples, tmp_path)
    for rung in steps.variants:
        difference = yardstick.hold(FirstAnswer(gang_of(rung.trial.plan.num_ranks)), rung, SAME_NUMBERS)
        assert difference.within(SAME_NUMBERS.tolerance), (rung.name, difference)


def test_a_planted_fault_is_found_and_named(record: Record) -> None:
    """With processes of its own, as the command starts them."""
    capsule = read_capsule(record("tied").folder)
    loss = f"{loss_of_the_split.__module__}:{loss_of_the_split.__name__}"
    steps = ladder(trial_of(capsule, [f"models.policy_trainer.loss={loss}"], 1), num_devices=1)
    assert {entry.name for entry in steps.left_out} == set(LADDER[5:])
    said: list[str] = []
    comparison = climb(replace(steps, variants=(steps.variants[0], steps.variants[3])), capsule.samples, said.append)
    (failure,) = comparison.failures()
    assert failure.startswith("'packing off, micro-batch 1' differs from the base by "), failure
    assert "in the gradient of model." in failure
    assert said == ["1 of 3: packing off, micro-batch 1", "2 of 3: checkpointing full", "3 of 3: bfloat16"]
    document = json.loads(json.dumps(comparison.document(), allow_nan=False))
    assert [row["name"] for row in document["variants"]] == ["packing off, micro-batch 1", "checkpointing full"]
    assert document["precision"][0].keys() == {"name", "loss_rel", "grad_rel", "worst", "tolerance"}
    assert document["base"]["num_ranks"] == 1


def test_the_command_prints_one_object_and_needs_neither_ray_nor_an_engine(mixture: Recording) -> None:
    program = (
        "import sys; from chatlearn.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 9 * ('ray' in sys.modules or 'vllm' in sys.modules))"
    )
    command = [sys.executable, "-c", program, "replay", str(mixture.folder), "models.policy_trainer.packing=False"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["loss"] == pytest.approx(mixture.stats.loss, rel=RELATIVE)
    assert document["grad_norm"] == pytest.approx(mixture.stats.grad_norm, rel=RELATIVE)
    assert document["recorded"]["grad_norm"] == mixture.stats.grad_norm
    assert document["iteration"] == ITERATION
