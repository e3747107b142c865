"""Kills at any moment, also inside a save: the same command goes on, and the end is that of a run nobody disturbed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from killing import Deed, episodes_for, kill
from runs import Launcher, finish

from chatlearn.resume_check.comparison import compare_runs

LONGEST_TEST_S = 900  # Five starts, which on a busy machine take their time.
THREE: tuple[Deed, ...] = ("driver in a save", "rank", "rank in a save")
SEED = 3
NUM_EPISODES = episodes_for(THREE)
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
    """No checkpoint that was published is ever lost, no process stays, and nothing is learned twice or never."""
    chance, output, twin = random.Random(SEED), tmp_path / "killed", tmp_path / "twin"
    kills = [kill(output, launcher.start(output, *SAVING), deed, chance, keep=0) for deed in THREE]
    assert [problem for one in kills for problem in one.problems] == []
    assert any(one.unfinished != "-" for one in kills), f"no kill lay inside a save: {kills}"
    for folder in (output, twin):
        ended = finish(launcher.start(folder, *SAVING))
        assert ended.returncode == 0, ended.stderr
    compared = compare_runs(twin, output)
    assert compared.difference is None, f"{compared.difference} after {kills}"
    assert compared.counts["checkpoints"] == NUM_EPISODES
    assert compared.counts["rollouts"] == NUM_EPISODES * 16
