"""A disk that fills up while a run trains: it says so and goes on, and what was saved before is there and good."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from killing import lost
from runs import ROOT, RUN_TIMEOUT_S, Launcher, metrics

from chatlearn.checkpoint.layout import list_complete

NUM_EPISODES = 4
DISK = "8m"  # One checkpoint of the tiny model fits, and the second does not.
SMALL = (
    f"runtime_args.num_episode={NUM_EPISODES}",
    "runtime_args.rollout_backend=transformers",
    "runtime_args.sample_per_episode=16",
    "runtime_args.train_global_batch_size=16",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
    "runtime_args.save_episode_interval=1",
    "runtime_args.keep_checkpoints=0",
    "models.policy.max_response_tokens_length=16",
    "models.reward.num_cpu=1",
)
# In a name space of its own, so that the disk goes with the last process; what was on it is copied out before.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size={size} none "$0"
"$@"
status=$?
cp -r "$0" "$0-at-the-end"
exit $status
"""


def small_disk(folder: Path, size: str, command: list[str]) -> list[str]:
    """The command, with a disk of ``size`` at ``folder``."""
    return ["unshare", "-rm", "bash", "-c", ON_A_SMALL_DISK.format(size=size), str(folder), *command]


def test_a_full_disk_ends_neither_the_run_nor_what_was_saved(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "try").mkdir()
    tried = subprocess.run(small_disk(tmp_path / "try", "1m", ["true"]), capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no disk can be mounted here, not even in a name space of one's own: {tried.stderr.strip()}")
    disk = tmp_path / "run" / "save_model"
    disk.mkdir(parents=True)
    ended = subprocess.run(
        small_disk(disk, DISK, launcher.command(tmp_path / "run", *SMALL)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert "cannot be written" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
    root = disk.with_name("save_model-at-the-end") / "policy_trainer"
    saved = list_complete(root)
    assert len(saved) == 1
    assert lost(root, saved) == []
    assert (root / "latest").read_text().strip() == saved[-1].name
    assert sorted(metrics(tmp_path / "run")) == list(range(1, NUM_EPISODES + 1)), "it went on without the disk"
