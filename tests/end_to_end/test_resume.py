"""A run whose newest checkpoint was damaged goes on from the one before, on other ranks; then it is sent back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import Launcher, metrics

LONGEST_TEST_S = 900  # Four starts, which on a busy machine take their time.
MEASURE = "eval/DigitalLearningGmbH/MATH-lighteval/avg@1"
SMALL = (
    "runtime_args.rollout_backend=transformers",
    "runtime_args.sample_per_episode=32",
    "runtime_args.train_global_batch_size=32",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=1",
    "runtime_args.eval_samples_per_prompt=1",
    "runtime_args.save_episode_interval=1",
    "runtime_args.keep_checkpoints=0",
    f"runtime_args.keep_best={MEASURE}",
    "models.policy_trainer.save_hf=False",
    "models.reward.num_cpu=1",
)


@pytest.mark.timeout(LONGEST_TEST_S)
def test_damage_another_number_of_ranks_and_going_back(guests: Launcher, tmp_path: Path) -> None:
    """Three processes one after the other: the metrics and checkpoints they leave belong to one run."""
    root = tmp_path / "save_model" / "policy_trainer"
    first = guests.run(tmp_path, *SMALL, "runtime_args.num_episode=3")
    assert first.returncode == 0, first.stderr
    measured = {episode: metrics(tmp_path)[episode][MEASURE] for episode in (1, 2, 3)}
    assert {episode: saved_state(root, episode)["evaluation"][MEASURE] for episode in (1, 2, 3)} == measured
    best = max(measured, key=lambda episode: (measured[episode], episode))
    assert (root / "best").read_text() == f"{best}\n"

    shard = root / "3" / "optimizer" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    others = ("models.policy_trainer.num_gpu=1", "models.policy_trainer.optimizer.lr=0.0001")
    second = guests.run(tmp_path, *SMALL, *others, "runtime_args.num_episode=4")
    assert second.returncode == 0, second.stderr
    assert "is put aside as" in second.stderr
    assert "optimizer/__1_0.distcp has checksum" in second.stderr
    assert f"resumed from {root / '2'}, after episode 2" in second.stderr
    assert "  models.policy_trainer.num_gpu: 2 -> 1" in second.stderr
    assert "  models.policy_trainer.optimizer.lr: 0.0002 -> 0.0001" in second.stderr
    assert folders(root) == ["1", "2", "3", "3.damaged", "4"]
    assert sorted(metrics(tmp_path)) == [1, 2, 3, 4]
    assert metrics(tmp_path)[2][MEASURE] == measured[2]
    asked = [prompts(tmp_path, episode) for episode in (1, 2, 3, 4)]
    assert len(set.union(*asked)) == sum(map(len, asked)), "a prompt was asked twice: the data began anew"

    back = (*SMALL, "runtime_args.load_data_checkpoint_iteration=1", "runtime_args.num_episode=2")
    third = guests.run(tmp_path, *back)
    assert third.returncode == 0, third.stderr
    assert "going back to checkpoint 1; newer ones are put aside when the run starts: 2, 3, 4" in third.stderr
    assert folders(root) == ["1", "2", "2.abandoned", "3.abandoned", "3.damaged", "4.abandoned"]
    assert saved_state(root, 2)["gone_back_to"] == 1
    assert sorted(metrics(tmp_path)) == [1, 2]
    assert prompts(tmp_path, 2) == asked[1]
    assert (tmp_path / "run.lock").read_text() == ""
    again = guests.run(tmp_path, *back)
    assert again.returncode == 0, again.stderr
    assert "has gone back to checkpoint 1 before" in again.stderr
    assert "finished at 2" in again.stderr


def saved_state(root: Path, iteration: int) -> dict[str, Any]:
    """The counters and the evaluation of a checkpoint."""
    state: dict[str, Any] = json.loads((root / str(iteration) / "run_state.json").read_text())
    return state


def folders(root: Path) -> list[str]:
    """Every checkpoint, whatever it is called."""
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def prompts(output: Path, episode: int) -> set[str]:
    """What an episode asked."""
    path = output / "rollouts" / f"episode_{episode:06d}.jsonl"
    return {json.loads(line)["prompt_uid"] for line in path.read_text().split("\n")[:-1]}
