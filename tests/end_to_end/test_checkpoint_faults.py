"""Kills at any moment, also inside a save: the same command goes on, and the end is that of a run nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from killing import Deed, episodes_for, kill, newest
from runs import Launcher, actors, finish, wait_until

from chatlearn.checkpoint.durable import STAGING_PREFIX
from chatlearn.config.layout import TRAINER_CHECKPOINTS
from chatlearn.resume_check.comparison import compare_runs

LONGEST_TEST_S = 900  # Five starts, which on a busy machine take their time.
THREE: tuple[Deed, ...] = ("driver in a save", "rank", "rank in a save")
SEED = 3
NUM_EPISODES = episodes_for(THREE) + 2  # for the exporter, which dies in the last life
HUGGING_FACE_OF = "save_model/policy_trainer/{}/huggingface/config.json"
SAVING = (
    f"runtime_args.num_episode={NUM_EPISODES}",
    "runtime_args.rollout_backend=transformers",
    "runtime_args.sample_per_episode=16",
    "runtime_args.train_global_batch_size=16",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
    "runtime_args.save_episode_interval=1",
    "runtime_args.keep_checkpoints=0",
    "models.policy_trainer.save_hf=True",
    "models.policy.max_response_tokens_length=16",
    "models.reward.num_cpu=1",
)


@pytest.mark.timeout(LONGEST_TEST_S)
def test_killed_three_times_a_run_ends_as_one_that_nobody_disturbed(launcher: Launcher, tmp_path: Path) -> None:
    """No checkpoint that was published is ever lost, no process stays, and nothing is learned twice or never.

    In the last life it is the exporter that dies, which costs nothing. The twin's training waits for its saves.
    """
    chance, output, twin = random.Random(SEED), tmp_path / "killed", tmp_path / "twin"
    kills = [kill(output, launcher.start(output, *SAVING), deed, chance, keep=0) for deed in THREE]
    assert [problem for one in kills for problem in one.problems] == []
    assert any(one.unfinished != "-" for one in kills), f"no kill lay inside a save: {kills}"
    end_without_exporter(output, launcher.start(output, *SAVING))
    ended = launcher.run(twin, *SAVING, "runtime_args.save_in_background=False")
    assert ended.returncode == 0, ended.stderr
    compared = compare_runs(twin, output)
    assert compared.difference is None, f"{compared.difference} after {kills}"
    assert compared.counts["checkpoints"] == NUM_EPISODES
    assert compared.counts["rollouts"] == NUM_EPISODES * 16


def end_without_exporter(output: Path, run: subprocess.Popen[str]) -> None:
    """Kill the exporter once it has worked; a newcomer makes what is missing, whether the kill met a pause or not."""
    before = newest(output / TRAINER_CHECKPOINTS)
    wait_until((output / HUGGING_FACE_OF.format(before + 1)).exists, run, "a checkpoint of the last life")
    (exporter,) = (row["pid"] for row in actors(output) if row["role"] == "exporter")
    os.kill(exporter, signal.SIGKILL)
    ended = finish(run)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("another one makes the Hugging Face directory") == 1, ended.stderr
    made = range(before + 1, NUM_EPISODES + 1)
    assert [number for number in made if not (output / HUGGING_FACE_OF.format(number)).exists()] == []
    assert [path for path in (output / "save_model").rglob(f"{STAGING_PREFIX}*") if path.is_dir()] == []
    assert [row["state"] for row in actors(output) if row["role"] == "exporter"] == ["finished", "replaced"]
