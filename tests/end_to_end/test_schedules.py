"""Every schedule as a whole run: answers are as old as they may be, every prompt counts once, also after a resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import Launcher, finish, metrics, trained, wait_until

NUM_PROMPTS, NUM_COMPLETIONS = 8, 8
SMALL = (
    "runtime_args.rollout_backend=transformers",
    f"runtime_args.sample_per_episode={NUM_PROMPTS * NUM_COMPLETIONS}",
    f"runtime_args.train_global_batch_size={NUM_PROMPTS * NUM_COMPLETIONS}",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
    "runtime_args.save_episode_interval=100",
    "models.policy_trainer.num_gpu=1",
    "models.policy.max_response_tokens_length=48",
    "models.reward.num_cpu=1",
)
SCHEDULES: dict[str, tuple[tuple[str, ...], int]] = {
    "one step off": (("runtime_args.schedule=one_step_off",), 1),
    "over-sampling": (("runtime_args.over_sampling_ratio=1.5",), 0),
    "partial rollout": (
        ("runtime_args.use_partial_rollout=True", "models.partial_rollout_manager.mini_response_per_prompt=4"),
        1,
    ),
}
EXACT = ("policy_trainer/loss", "policy_trainer/grad_norm", "rollout/reward_mean", "rollout/staleness_max")
ASYNC = ("runtime_args.schedule=async", "runtime_args.max_staleness=2", "models.policy.num_gpu=2")


def lines(output: Path, episode: int) -> list[dict[str, Any]]:
    """The answers that an episode learned from."""
    path = output / "rollouts" / f"episode_{episode:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def ages(output: Path, episode: int) -> set[int]:
    """How many versions older than the weights that learned from them the tokens of an episode were."""
    return {episode - 1 - run["version"] for line in lines(output, episode) for run in line["policy_versions"]}


@pytest.mark.parametrize("name", SCHEDULES)
def test_answers_are_as_old_as_the_schedule_says(launcher: Launcher, tmp_path: Path, name: str) -> None:
    overrides, oldest = SCHEDULES[name]
    ended = launcher.run(tmp_path, *SMALL, *overrides, "runtime_args.num_episode=4")
    assert ended.returncode == 0, ended.stderr
    assert "engine and trainer agree" in ended.stderr
    later = [ages(tmp_path, episode) for episode in (2, 3, 4)]
    assert ages(tmp_path, 1) == {0}
    assert set.union(*later) == set(range(oldest + 1)) if name != "one step off" else set.union(*later) == {1}
    for episode in range(1, 5):
        numbers = metrics(tmp_path)[episode]
        assert numbers["rollout/staleness_max"] == max(ages(tmp_path, episode))
        assert numbers["rollout/engine_busy_s"] > 0 or (name, episode) == ("one step off", 4), "it asks no fifth one"
    if name == "partial rollout":
        seen = [json.dumps([line["prompt_uid"], line["token_ids"]]) for e in range(1, 5) for line in lines(tmp_path, e)]
        assert len(seen) == sum(metrics(tmp_path)[e]["partial_rollout_manager/num_train_samples"] for e in range(1, 5))
        spanning = [line for e in (2, 3, 4) for line in lines(tmp_path, e) if len(line["policy_versions"]) > 1]
        assert spanning, "no answer went on in a second episode"
    else:
        asked = [line["prompt_uid"] for episode in range(1, 5) for line in lines(tmp_path, episode)]
        assert len(asked) == 4 * NUM_PROMPTS * NUM_COMPLETIONS
        assert len(set(asked)) == 4 * NUM_PROMPTS
    if name == "over-sampling":
        assert metrics(tmp_path)[2]["rollout/stopped_prompts"] == NUM_PROMPTS / 2


@pytest.mark.parametrize("name", ["one step off", "partial rollout"])
def test_what_was_open_goes_on_as_if_nothing_had_happened(launcher: Launcher, tmp_path: Path, name: str) -> None:
    """A checkpoint of the second episode, put where a run that ended there would have left it."""
    overrides, _ = SCHEDULES[name]
    wishes = (*SMALL, *overrides, "runtime_args.num_episode=4", "runtime_args.save_episode_interval=2")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ended = launcher.run(whole, *wishes)
    assert ended.returncode == 0, ended.stderr
    saved = Path("save_model") / "policy_trainer" / "2"
    assert (whole / saved / "open_groups.json").is_file()
    shutil.copytree(whole / saved, resumed / saved)
    ended = launcher.run(resumed, *wishes)
    assert ended.returncode == 0, ended.stderr
    assert "engine and trainer agree" in ended.stderr
    for episode in (3, 4):
        assert lines(resumed, episode) == lines(whole, episode)
        ours, theirs = metrics(resumed)[episode], metrics(whole)[episode]
        assert {key: ours[key] for key in EXACT} == {key: theirs[key] for key in EXACT}


def test_a_schedule_runs_is_interrupted_and_goes_on(launcher: Launcher, tmp_path: Path) -> None:
    """Asynchronous, with two engines; what was under way when it was interrupted is learned from when it goes on."""
    run = launcher.start(tmp_path, *SMALL, *ASYNC, "runtime_args.num_episode=60")
    wait_until(trained(tmp_path, episode=4), run, "fourth episode")
    os.kill(run.pid, signal.SIGINT)
    ended = finish(run)
    assert ended.returncode == 130, ended.stderr
    last = max(metrics(tmp_path))
    assert 4 <= last < 60
    checkpoint = tmp_path / "save_model" / "policy_trainer" / str(last)
    unfinished = json.loads((checkpoint / "run_state.json").read_text())["num_open_groups"]
    assert unfinished >= NUM_PROMPTS, "engines were busy with the next episodes"

    until = last + 2 + unfinished // NUM_PROMPTS
    ended = launcher.run(tmp_path, *SMALL, *ASYNC, f"runtime_args.num_episode={until}")
    assert ended.returncode == 0, ended.stderr
    assert all(max(ages(tmp_path, episode)) <= 2 for episode in range(1, until + 1))
    assert any(max(ages(tmp_path, episode)) > 0 for episode in range(1, until + 1)), "it never ran ahead"
    asked = [line["prompt_uid"] for episode in range(1, until + 1) for line in lines(tmp_path, episode)]
    assert len(asked) == until * NUM_PROMPTS * NUM_COMPLETIONS
    assert len(set(asked)) == until * NUM_PROMPTS, "a prompt was asked twice: the data began anew"
    stream = [f"0_{place}" for place in range(600)]
    assert set(asked) <= set(stream)
