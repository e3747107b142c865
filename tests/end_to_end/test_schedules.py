"""Every schedule as a whole run: answers are as old as they may be, every prompt counts once, also after a resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

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
    "models.policy_trainer.save_hf=False",
    "models.policy.max_response_tokens_length=48",
    "models.reward.num_cpu=1",
)
EPISODES = (1, 2, 3, 4)
NUM_EPISODES = f"runtime_args.num_episode={len(EPISODES)}"
EXACT = ("policy_trainer/loss", "policy_trainer/grad_norm", "rollout/reward_mean", "rollout/staleness_max")
ASYNC = ("runtime_args.schedule=async", "runtime_args.max_staleness=2", "models.policy.num_gpu=2")


def lines(output: Path, episode: int) -> list[dict[str, Any]]:
    """The answers that an episode learned from."""
    path = output / "rollouts" / f"episode_{episode:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def ages(output: Path, episode: int) -> set[int]:
    """How many versions older than the weights that learned from them the tokens of an episode were."""
    return {episode - 1 - run["version"] for line in lines(output, episode) for run in line["policy_versions"]}


def require_ages(output: Path, episode: int, expected: set[int]) -> None:
    """The tokens of an episode are as old as they may be, its numbers say so, and engines worked while it lasted."""
    assert ages(output, episode) == expected
    numbers = metrics(output)[episode]
    assert numbers["rollout/staleness_max"] == max(expected)
    assert numbers["rollout/engine_busy_s"] > 0 or episode == len(EPISODES), "the last may have nobody left to ask"


def require_each_prompt_once(output: Path) -> None:
    """Every prompt was learned from in one episode, with all its answers."""
    asked = [line["prompt_uid"] for episode in EPISODES for line in lines(output, episode)]
    assert len(asked) == len(EPISODES) * NUM_PROMPTS * NUM_COMPLETIONS
    assert len(set(asked)) == len(EPISODES) * NUM_PROMPTS


def test_over_sampling_learns_from_whom_is_first(guests: Launcher, tmp_path: Path) -> None:
    ended = guests.run(tmp_path, *SMALL, "runtime_args.over_sampling_ratio=1.5", NUM_EPISODES)
    assert ended.returncode == 0, ended.stderr
    assert "engine and trainer agree" in ended.stderr
    for episode in EPISODES:
        require_ages(tmp_path, episode, {0})
    require_each_prompt_once(tmp_path)
    assert metrics(tmp_path)[2]["rollout/stopped_prompts"] == NUM_PROMPTS / 2


def test_one_step_off_answers_are_one_version_old_and_it_goes_on_to_the_bit(guests: Launcher, tmp_path: Path) -> None:
    whole = went_on_to_the_bit(guests, tmp_path, "runtime_args.schedule=one_step_off")
    require_ages(whole, 1, {0})
    for episode in (2, 3, 4):
        require_ages(whole, episode, {1})
    require_each_prompt_once(whole)


def test_partial_rollout_learns_from_answers_of_two_versions_and_goes_on_to_the_bit(
    guests: Launcher, tmp_path: Path
) -> None:
    whole = went_on_to_the_bit(
        guests,
        tmp_path,
        "runtime_args.use_partial_rollout=True",
        "models.partial_rollout_manager.mini_response_per_prompt=4",
    )
    require_ages(whole, 1, {0})
    for episode in (2, 3, 4):
        require_ages(whole, episode, {0, 1})
    answers = [line for episode in EPISODES for line in lines(whole, episode)]
    learned = sum(metrics(whole)[episode]["partial_rollout_manager/num_train_samples"] for episode in EPISODES)
    assert len(answers) == learned
    assert any(len(line["policy_versions"]) > 1 for line in answers), "no answer went on in a second episode"


def went_on_to_the_bit(guests: Launcher, folder: Path, *overrides: str) -> Path:
    """A whole run, and one that goes on from its second episode's checkpoint as if nothing had happened.

    That checkpoint lies where a run that ended there would have left it. Returns where the whole run is.
    """
    wishes = (*SMALL, *overrides, NUM_EPISODES, "runtime_args.save_episode_interval=2")
    whole, resumed = folder / "whole", folder / "resumed"
    ended = guests.run(whole, *wishes)
    assert ended.returncode == 0, ended.stderr
    saved = Path("save_model") / "policy_trainer" / "2"
    assert (whole / saved / "open_groups.json").is_file()
    shutil.copytree(whole / saved, resumed / saved)
    again = guests.run(resumed, *wishes)
    assert again.returncode == 0, again.stderr
    assert all("engine and trainer agree" in one.stderr for one in (ended, again))
    for episode in (3, 4):
        assert lines(resumed, episode) == lines(whole, episode)
        ours, theirs = metrics(resumed)[episode], metrics(whole)[episode]
        assert {key: ours[key] for key in EXACT} == {key: theirs[key] for key in EXACT}
    return whole


def test_a_schedule_runs_is_interrupted_and_goes_on(guests: Launcher, tmp_path: Path) -> None:
    """Asynchronous, with two engines; what was under way when it was interrupted is learned from when it goes on."""
    run = guests.start(tmp_path, *SMALL, *ASYNC, "runtime_args.num_episode=60")
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
    ended = guests.run(tmp_path, *SMALL, *ASYNC, f"runtime_args.num_episode={until}")
    assert ended.returncode == 0, ended.stderr
    assert all(max(ages(tmp_path, episode)) <= 2 for episode in range(1, until + 1))
    assert any(max(ages(tmp_path, episode)) > 0 for episode in range(1, until + 1)), "it never ran ahead"
    asked = [line["prompt_uid"] for episode in range(1, until + 1) for line in lines(tmp_path, episode)]
    assert len(asked) == until * NUM_PROMPTS * NUM_COMPLETIONS
    assert len(set(asked)) == until * NUM_PROMPTS, "a prompt was asked twice: the data began anew"
    stream = [f"0_{place}" for place in range(600)]
    assert set(asked) <= set(stream)
