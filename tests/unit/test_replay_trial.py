"""What a replay makes of a configuration, which ways a ladder tries, and how differences are measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import capsules
import numpy as np
import pytest
from safetensors.numpy import save_file

from chatlearn.checkpoint.capsule import Capsule, CapsuleFacts, read_capsule
from chatlearn.cli import main, show_comparison
from chatlearn.config.environment import Launcher, show_one_gpu
from chatlearn.errors import ConfigError, RunError
from chatlearn.replay import trial as trial_module
from chatlearn.replay.comparison import Comparison, Row
from chatlearn.replay.difference import Difference, gradient_difference, loss_difference, loss_scale
from chatlearn.replay.ladder import LeftOut, by_ranks, ladder
from chatlearn.replay.measure import Measured
from chatlearn.replay.trial import trial_of

TRAINER = "models.policy_trainer"
# A run on eight ranks in which everything is spread somehow.
SPREAD = [
    f"{TRAINER}.num_gpu=8", f"{TRAINER}.fsdp_size=4", f"{TRAINER}.ulysses_sequence_parallel_size=2",
    "models.ref_policy.num_gpu=4", "models.ref_policy.fsdp_size=4",
    "models.ref_policy.ulysses_sequence_parallel_size=4", "models.policy.num_gpu=8",
    "runtime_args.colocation=[[policy,policy_trainer]]",
]  # fmt: skip
TORCHRUN = {"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.fixture(scope="module")
def capsule(tmp_path_factory: pytest.TempPathFactory) -> Capsule:
    root = tmp_path_factory.mktemp("capsules")
    facts = CapsuleFacts(1, 1, "interval", 1)
    return read_capsule(capsules.write_capsule(root, facts, [capsules.one_sample()], SPREAD))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def test_sizes_follow_the_ranks(capsule: Capsule) -> None:
    plans = [trial_of(capsule, (), num_ranks).plan for num_ranks in (1, 2, 6, 16)]
    assert [(plan.num_ranks, plan.fsdp_size, plan.sequence_parallel_size) for plan in plans] == [
        (1, 1, 1), (2, 2, 2), (6, 2, 2), (16, 4, 2),
    ]  # fmt: skip
    assert trial_of(capsule, (), 6).layout.num_data_ranks == 3


def test_overrides_speak_louder(capsule: Capsule) -> None:
    words = [
        f"{TRAINER}.fsdp_size=1",
        f"{TRAINER}.ulysses_sequence_parallel_size=1",
        f"{TRAINER}.max_token_in_packing=9",
    ]
    trial = trial_of(capsule, [*words, f"{TRAINER}.loss=gspo"], 2)
    assert (trial.plan.fsdp_size, trial.layout.num_data_ranks, trial.layout.max_tokens) == (1, 2, 9)
    assert trial.objective.loss is not trial_of(capsule, (), 2).objective.loss
    assert trial.model.path == capsule.model_dir


def test_code_of_a_capsule_is_not_run_unasked(capsule: Capsule) -> None:
    assert not trial_of(capsule, (), 1).model.trust_remote_code
    assert trial_of(capsule, [f"{TRAINER}.trust_remote_code=True"], 1).model.trust_remote_code


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (f"{TRAINER}.num_gpu=2", "torchrun --nproc-per-node 2 -m chatlearn replay"),
        (f"{TRAINER}.fsdp_size=3", "fsdp_size=3 must divide num_gpu=1"),
        (f"{TRAINER}.kl_coef=0.1", "none; use models.policy_trainer.kl_coef=0"),
        (f"{TRAINER}.lora.rank=4", "has no adapter; leave the key out"),
        (f"{TRAINER}.load=/other/model", "load=/other/model has no effect: the weights of the step are in"),
        (f"{TRAINER}.groupgemm=True", "groupgemm=True is for mixtures of experts, and the capsule"),
        (f"{TRAINER}.router_replay=compare", "router_replay=compare is for mixtures of experts, and the capsule"),
        (f"{TRAINER}.los=gspo", "did you mean"),
        ("runtime_args.device=cuda", "add runtime_args.device=cpu"),
    ],
)
def test_what_cannot_be_is_refused(
    capsule: Capsule, word: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial_module, "visible_gpus", lambda: 0)
    assert main(["replay", str(capsule.directory), word]) == 2
    printed = capfd.readouterr()
    assert said in printed.err
    assert not printed.out


def test_a_recorded_configuration_that_was_spoilt_is_named(tmp_path: Path) -> None:
    folder = capsules.write_capsule(tmp_path, CapsuleFacts(1, 1, "interval", 1), [capsules.one_sample()], SPREAD)
    capsule = read_capsule(folder)
    capsule.config_file.write_text(capsule.config_file.read_text().replace("num_episode", "num_epsode"))
    with pytest.raises(ConfigError, match=r"config\.yaml: unknown key runtime_args\.num_epsode; did you mean"):
        trial_of(capsule, (), 1)


def test_a_folder_that_is_no_capsule_is_a_wrong_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path), "--compare"]) == 2
    assert "is no capsule" in capfd.readouterr().err


def test_torchrun_is_known_by_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # counts nodes, as the scripts of a run have it
    assert Launcher.read() == Launcher()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert Launcher.read() == Launcher(rank=3, local_rank=1, num_ranks=4, meeting="tcp://node0:29500")
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match="RANK is not"):
        Launcher.read()


def test_compare_under_torchrun_is_refused(capsule: Capsule, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert main(["replay", str(capsule.directory), "--compare"]) == 2


def test_a_rank_sees_the_device_that_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, shown in ((0, "5"), (1, "7")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
        show_one_gpu(rank)
        assert Launcher.read() == Launcher()
        with pytest.raises(ConfigError, match="has no GPU"):
            show_one_gpu(1)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        show_one_gpu(0)


def test_a_ladder_leaves_out_what_cannot_be(capsule: Capsule) -> None:
    """Two heads cannot be dealt to four ranks; and four ranks do not fit on two devices."""
    trial = trial_of(capsule, (), 1)
    everywhere, here = ladder(trial, num_devices=None), ladder(trial, num_devices=2)
    assert [entry.name for entry in everywhere.left_out] == ["sequence parallel 4"]
    assert "2 attention heads" in everywhere.left_out[0].reason
    assert {entry.name for entry in here.left_out} == {"4 ranks", "sequence parallel 4", "2 replicas of 2 shards"}
    assert set(by_ranks(here.rungs())) == {1, 2}
    assert {rung.trial.model.compute_dtype for rung in everywhere.variants} == {"float32"}


def test_every_rung_differs_from_the_base(capsule: Capsule) -> None:
    """Whatever the run was, each way is another one than its own, and none is tried twice."""
    trial = trial_of(capsule, (), 1)
    unpacked = replace(trial, layout=replace(trial.layout, packing=False, micro_batch_size=3))
    sparing = replace(trial, model=replace(trial.model, checkpointing="full", meta_init=True))
    for start in (trial, unpacked, sparing):
        steps = ladder(start, num_devices=None)
        tried = [steps.base.trial, *(rung.trial for rung in steps.rungs())]
        assert all(tried.count(one) == 1 for one in tried)
        assert len(tried) == 11


def test_differences_are_relative_to_each_gradient(tmp_path: Path) -> None:
    base = {"large": np.array([30.0, 40.0]), "small": np.array([0.3]), "nothing": np.array([1e-9])}
    save_file(base, tmp_path / "base")

    def difference(**changes: np.ndarray) -> tuple[float, str]:
        save_file({**base, **changes}, tmp_path / "other")
        return gradient_difference(tmp_path / "base", tmp_path / "other", floor=1e-3)

    assert difference()[0] == 0.0
    assert difference(large=np.array([30.0, 40.5])) == (pytest.approx(0.01), "large")
    assert difference(small=np.array([0.33])) == (pytest.approx(0.1), "small")
    assert difference(nothing=np.array([5e-4])) == (pytest.approx(0.01, rel=1e-3), "nothing"), "the floor is 0.05"
    assert difference(small=np.array([0.5]), large=np.array([30.0, 41.0]))[1] == "small"
    assert math.isnan(difference(small=np.array([math.nan]), large=np.array([0.0, 0.0]))[0])
    assert difference(other=np.zeros(1)) == (math.inf, "other")


def test_what_is_not_a_number_is_never_within() -> None:
    assert Difference(0.0, 1e-5, "a").within(1e-5)
    for loss, gradient in ((math.nan, 0.0), (0.0, math.nan), (0.0, 2e-5), (2e-5, 0.0), (0.0, math.inf)):
        assert not Difference(loss, gradient, "a").within(1e-5)


def test_a_loss_that_cancels_out_is_measured_by_its_terms() -> None:
    sample = capsules.one_sample(length=6)
    assert loss_scale([sample, sample]) == pytest.approx(0.5)
    assert loss_difference(0.0, 1e-8, scale=0.5) == pytest.approx(2e-7)
    assert loss_difference(0.0, 0.0, scale=0.0) == 0.0


def test_what_disagrees_is_said_after_the_document(capfd: pytest.CaptureFixture[str]) -> None:
    """Scripts read standard output, people standard error; both learn of everything."""
    base = Measured(**dict.fromkeys(Measured.__dataclass_fields__, 1.0) | {"not_finite": (), "dtype": "float32"})
    rows = (Row("2 ranks", Difference(0.0, 1e-7, "a"), 1e-5), Row("4 ranks", Difference(math.nan, 1.0, "b"), 1e-5))
    with pytest.raises(RunError, match="'4 ranks' differs from the base by nan in the loss") as caught:
        show_comparison(Comparison(base, rows, (), (LeftOut("sequence parallel 4", "too few heads"),)))
    assert "2 ranks" not in str(caught.value)
    printed = capfd.readouterr()
    document = json.loads(printed.out)
    assert document["variants"][1] == {"name": "4 ranks", "loss_rel": "nan", "grad_rel": 1.0, "worst": "b"}
    assert document["left_out"] == [{"name": "sequence parallel 4", "reason": "too few heads"}]
    assert "left out" in printed.err
    assert "more than 1e-05" in " ".join(printed.err.replace("│", " ").split())
