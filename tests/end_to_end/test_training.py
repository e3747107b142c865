"""The whole job: train, learn, save, convert; and everything a run promises to leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, Launcher, RayHead, actors, finish, metrics

NUM_EPISODES = 10
NUM_STEPS = NUM_EPISODES
TOLERANCE = 1e-5  # nats, fp32 on the CPU
METRICS = [
    "policy_trainer/loss",
    "policy_trainer/pg_loss",
    "policy_trainer/kl_loss",
    "policy_trainer/entropy",
    "policy_trainer/grad_norm",
    "policy_trainer/clip_fraction",
    "policy_trainer/lr",
    "policy_trainer/tokens",
    "policy_trainer/memory_gb",
    "rollout/reward_mean",
    "rollout/reward_std",
    "rollout/solve_none_ratio",
    "rollout/solve_all_ratio",
    "rollout/response_length_mean",
    "rollout/truncated_ratio",
    "rollout/tokens_per_s",
    "numerics/rollout_logprob_diff_mean",
    "numerics/rollout_logprob_diff_max",
    "numerics/rollout_kl",
    "sync/seconds",
    "sync/gigabytes_per_s",
    "sync/version",
    "time/episode",
    "time/rollout",
    "time/reward",
    "time/train",
    "time/publish",
    "time/idle",
]
ORIGINAL_METRICS = [
    "policy_trainer/entropy_loss",
    "rollout/response_token_length",
    "rollout/prompt_token_length",
    "rollout/response_clip_ratio",
    "rollout/response_max",
    "rollout/response_25_percentile",
    "rollout/response_50_percentile",
    "rollout/response_75_percentile",
    "rule_reward/train_reward_score",
    "advantage_compute/all_correct_ratio",
    "advantage_compute/all_wrong_ratio",
    "engine/timer_summary/episode",
    "engine/timer_summary/train",
    "engine/timer_summary/environment",
    "engine/timer_summary/sync_parameters",
    "engine/timer_summary/tps_throughput",
]


@pytest.fixture(scope="module")
def output(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the quickstart's configuration with vLLM, shorter than the real one."""
    folder = tmp_path_factory.mktemp("run")
    run = launcher.start(
        folder,
        f"runtime_args.num_episode={NUM_EPISODES}",
        f"runtime_args.eval_episode_interval={NUM_EPISODES}",
        "runtime_args.save_episode_interval=4",
        "models.policy_trainer.optimizer.lr=4e-4",  # Twice the quickstart's: fewer episodes must show the rise.
    )
    ended = finish(run)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "mean reward" in ended.stderr, "the curve"
    return folder


def test_reward_rises(output: Path) -> None:
    rewards = [metrics(output)[episode]["rollout/reward_mean"] for episode in range(1, NUM_EPISODES + 1)]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.15, rewards


def test_engine_and_trainer_agree_in_every_episode(output: Path) -> None:
    for episode in range(1, NUM_EPISODES + 1):
        assert metrics(output)[episode]["numerics/rollout_logprob_diff_mean"] < TOLERANCE


def test_every_promised_number_is_there(output: Path) -> None:
    steps = metrics(output)
    assert sorted(steps) == list(range(NUM_EPISODES + 1))
    assert "eval/DigitalLearningGmbH/MATH-lighteval/avg@1" in steps[0]
    for episode in range(1, NUM_EPISODES + 1):
        assert set(METRICS + ORIGINAL_METRICS) <= steps[episode].keys()
    for name in ("avg@1", "pass@1"):
        assert f"eval/DigitalLearningGmbH/MATH-lighteval/{name}" in steps[NUM_EPISODES]
    assert "eval/eval_DigitalLearningGmbH/MATH-lighteval" in steps[NUM_EPISODES]
    assert "time/save" in steps[4]
    assert "policy_trainer/mfu" not in steps[1], "nobody knows the peak of this CPU"


def test_every_promised_file_is_there(output: Path) -> None:
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["versions"]["torch"]
    assert manifest["data"][0]["sha256"]
    assert {row["role"] for row in actors(output)} == {"driver", "policy", "policy_trainer", "reward", "exporter"}
    for row in actors(output):
        assert row["role"] == "driver" or (output / "logs" / f"{row['role']}_{row['rank']}.log").exists()
    assert list((output / "logs").glob("*_meeting_*")) == [], "all have met"
    assert list((output / "tensorboard").iterdir())
    folders = {path.name for path in (output / "save_model" / "policy_trainer").iterdir()}
    assert folders == {"8", "10", "latest"}, "the newest two are kept"
    assert (output / "data_checkpoint_path" / "run_state.json").exists()


def test_rollouts_are_readable(output: Path) -> None:
    lines = (output / "rollouts" / "episode_000003.jsonl").read_text().split("\n")[:-1]
    assert len(lines) == 256
    line = json.loads(lines[0])
    assert len(line["token_ids"]) == len(line["rollout_logprobs"])
    assert line["policy_versions"] == [{"version": 2, "count": len(line["token_ids"])}]
    assert {"prompt_uid", "prompt", "response", "reward", "advantage", "finish_reason"} <= line.keys()


def test_the_written_configuration_is_a_configuration(output: Path) -> None:
    command = [sys.executable, "-m", "chatlearn", "grpo", "-c", str(output / "config.yaml"), "--dry-run"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout == (output / "config.yaml").read_text()


def test_converted_model_agrees_with_the_trainer(output: Path, tmp_path: Path) -> None:
    """Trainer, transformers and vLLM compute the same log-probabilities from the last checkpoint, in fp32."""
    command = [sys.executable, "chatlearn/offline_ckpt_converter.py", "--hf_dir", "embedded/tiny_qwen3"]
    command += ["--ckpt_dir", str(output / "save_model" / "policy_trainer"), "--iter", str(NUM_STEPS)]
    command += ["--save_dir", str(tmp_path / "bfloat16"), "--groupgemm", "0"]
    converted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert converted.returncode == 0, converted.stderr

    checked = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("agreement.py")), str(output), str(tmp_path), str(NUM_STEPS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr[-3000:]
    gaps = json.loads(checked.stdout.splitlines()[-1])
    assert gaps["trainer_transformers"] < TOLERANCE
    assert gaps["trainer_vllm"] < TOLERANCE
    assert gaps["bfloat16_vllm"] < 0.2, "rounding alone, see docs/status.md"


def test_a_run_joins_a_ray_cluster_and_leaves_it_running(guests: Launcher, ray_head: RayHead, tmp_path: Path) -> None:
    """A mixture of experts with reference model, two steps an episode, GSPO, grouped experts, the engine's routes and
    two ranks to a sequence, on a foreign Ray; what its third step consumed can be run again."""
    run = guests.run(
        tmp_path / "run",
        "models.policy_trainer.load=embedded/tiny_qwen3_moe",
        "models.policy_trainer.groupgemm=True",
        "models.policy_trainer.kl_coef=0.01",
        "models.policy_trainer.loss=gspo",
        "models.policy_trainer.ulysses_sequence_parallel_size=2",
        "models.policy_trainer.router_replay=True",
        "models.policy_trainer.gradient_checkpointing=selective",
        "models.policy_trainer.optimizer.schedule=cosine",
        "models.policy_trainer.optimizer.state_dtype=bfloat16",
        "runtime_args.capsule_interval=3",
        "runtime_args.sample_per_episode=64",
        "runtime_args.train_global_batch_size=32",
        "runtime_args.num_episode=2",
        "runtime_args.eval_episode_interval=0",
        "runtime_args.enable_eval_before_training=False",
    )
    assert run.returncode == 0, run.stderr
    assert ray_head.is_running()
    for episode in (1, 2):
        numbers = metrics(tmp_path / "run")[episode]
        assert numbers["numerics/rollout_logprob_diff_mean"] < TOLERANCE
        assert {"time/reference", "time/old_logprobs"} <= numbers.keys()
        assert numbers["policy_trainer/steps"] == 2
        assert numbers["numerics/router_agreement"] > 0.99, "in float32 engine and trainer rarely differ"
    assert numbers["policy_trainer/kl_loss"] > 0
    assert numbers["policy_trainer/lr"] == 0, "the last step of a cosine has min_lr"
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "-m", "chatlearn", "replay"]
    command += [str(tmp_path / "run" / "capsules" / "iteration_000003")]
    replayed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert replayed.returncode == 0, replayed.stderr
    again = json.loads(replayed.stdout)
    assert again["num_ranks"] == 2
    assert again["loss"] == pytest.approx(again["recorded"]["loss"], rel=TOLERANCE)
    assert again["grad_norm"] == pytest.approx(again["recorded"]["grad_norm"], rel=TOLERANCE)
