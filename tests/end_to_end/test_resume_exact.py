"""A run that is killed goes on to the bit as if nobody had: cut after every episode, whatever the engine and the model.

Weights, optimizer, random states, answers, rewards, advantages and every number but those of the machine are compared
with a run that nobody disturbed, whose first episodes are what a run that was killed after them leaves. Processes are
really killed by the command itself, ``chatlearn resume-check``, and in ``test_checkpoint_faults.py``. Every kind at
every cut is long; one of each is not.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from runs import ROOT, Launcher

from chatlearn.checkpoint.layout import LATEST_NAME, list_complete
from chatlearn.checkpoint.manifest import read_manifest
from chatlearn.config.layout import TRAINER_CHECKPOINTS
from chatlearn.resume_check.comparison import compare_runs

LONGEST_TEST_S = 900  # Three starts, which on a busy machine take their time.
NUM_EPISODES = 3
SMALL = (
    "runtime_args.sample_per_episode=32",
    "runtime_args.train_global_batch_size=16",  # two optimizer steps an episode
    "models.policy_trainer.num_gpu=2",
    "models.policy_trainer.packing=True",
    "models.policy_trainer.save_hf=False",
    "models.policy_trainer.optimizer.schedule=cosine",
    "models.policy.max_response_tokens_length=32",
    "models.reward.num_cpu=1",
)
SAVED = (
    f"runtime_args.num_episode={NUM_EPISODES}",
    "runtime_args.save_episode_interval=1",
    "runtime_args.keep_checkpoints=0",
)
DENSE = (
    "models.policy.enforce_eager=True",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
)
EXPERTS = (
    "models.policy_trainer.load=embedded/tiny_qwen3_moe",
    "models.policy_trainer.groupgemm=True",
    "models.policy_trainer.kl_coef=0.01",
    "runtime_args.rollout_backend=transformers",
    "models.policy.num_gpu=2",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=1",
)
KINDS = {"dense model, vLLM": DENSE, "mixture of experts, two engines, evaluation in between": EXPERTS}


def left_after(run: Path, episode: int, folder: Path) -> Path:
    """What ``run`` would have left if it had been killed in the next episode, once ``episode`` was saved."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("logs", "actors.json"))
    for path in (folder / "rollouts").iterdir():
        if int(path.stem.removeprefix("episode_")) > episode:
            path.write_text("half a li")
    for checkpoint in list_complete(folder / TRAINER_CHECKPOINTS):
        if read_manifest(checkpoint).episode > episode:
            shutil.rmtree(checkpoint)
        elif read_manifest(checkpoint).episode == episode:
            (folder / TRAINER_CHECKPOINTS / LATEST_NAME).write_text(f"{checkpoint.name}\n")
    return folder


def whole_run(guests: Launcher, folder: Path, kind: str) -> Path:
    """A run of its own for every test that cuts it, so that each can be run alone."""
    ended = guests.run(folder, *SMALL, *SAVED, *KINDS[kind])
    assert ended.returncode == 0, ended.stderr
    return folder


def require_same_to_the_bit(guests: Launcher, whole: Path, kind: str, cut: int) -> None:
    """Go on from where ``whole`` would have been killed after the episode ``cut``."""
    resumed = left_after(whole, cut, whole.with_name(f"cut_after_{cut}"))
    ended = guests.run(resumed, *SMALL, *SAVED, *KINDS[kind])
    assert ended.returncode == 0, ended.stderr
    assert f", after episode {cut}" in ended.stderr, "it began anew, which proves nothing"
    compared = compare_runs(whole, resumed)
    assert compared.difference is None, f"cut after episode {cut}: {compared.difference}"
    assert compared.counts["checkpoints"] == NUM_EPISODES
    assert compared.counts["rollouts"] == NUM_EPISODES * 32
    assert min(compared.counts.values()) >= NUM_EPISODES, compared.counts


@pytest.mark.timeout(LONGEST_TEST_S)
def test_a_run_that_was_cut_is_the_same_to_the_bit(guests: Launcher, tmp_path: Path) -> None:
    kind = "dense model, vLLM"
    require_same_to_the_bit(guests, whole_run(guests, tmp_path / "whole", kind), kind, cut=1)


@pytest.mark.long
@pytest.mark.timeout(LONGEST_TEST_S)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_after_any_episode_is_the_same_to_the_bit(
    guests: Launcher, tmp_path: Path, kind: str
) -> None:
    whole = whole_run(guests, tmp_path / "whole", kind)
    for cut in range(1, NUM_EPISODES):
        require_same_to_the_bit(guests, whole, kind, cut)


@pytest.mark.timeout(LONGEST_TEST_S)
def test_the_command_proves_it_on_a_configuration_of_ones_own(launcher: Launcher, tmp_path: Path) -> None:
    """Really killed, with its Ray, and with keys of the file that the check sets itself; then a fault is planted."""
    words = [*launcher.command(tmp_path, *SMALL, *EXPERTS), "--episodes", "2", "--cut", "1"]
    words[words.index("grpo")] = "resume-check"
    checked = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    told = json.loads(checked.stdout)
    assert told["equal"]
    assert told["first_difference"] is None
    assert told["compared"]["rollouts"] == 2 * 32
    assert told["compared"]["checkpoints"] == 2
    assert told["compared"]["random_states"] == 2 * 2
    assert "equal: " in checked.stderr

    whole, resumed = (tmp_path / "resume_check" / name for name in ("uninterrupted", "interrupted"))
    assert "resumed from" in (tmp_path / "resume_check" / "resumed.log").read_text(), "it was killed and went on"
    answers = resumed / "rollouts" / "episode_000002.jsonl"
    lines = [json.loads(line) for line in answers.read_text().split("\n")[:-1]]
    lines[5]["token_ids"][-1] += 1
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    difference = compare_runs(whole, resumed).difference
    assert difference is not None
    assert (difference.kind, difference.episode) == ("rollouts", 2)
    assert difference.place == f"line 6.token_ids[{len(lines[5]['token_ids']) - 1}]"
