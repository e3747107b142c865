"""A disk that fills up while a run trains: it says so and goes on, and what was saved before is there and good.

Where the last checkpoint is lost too, the run ends with status 1: its end is nowhere on the disk. At which byte it is
full is the matter of ``tests/unit/test_checkpoint_full_disk.py``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from killing import lost
from runs import ROOT, RUN_TIMEOUT_S, Launcher, metrics

from chatlearn.budget import num_parameters
from chatlearn.checkpoint.durable import STAGING_PREFIX
from chatlearn.checkpoint.layout import list_complete
from chatlearn.checkpoint.manifest import HUGGING_FACE_FOLDER

TWO_FIT = "size=8m"  # Two checkpoints of the tiny model do, the second without its Hugging Face directory.
A_LITTLE = 16 * 1024  # bytes beyond weights and moments: less than random states and descriptions take
SMALL = (
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
# In a name space of its own, so that the disk goes with the last process; what was on it is copied out before. Another
# one beside it can only be read.
ON_A_SMALL_DISK = """
mkdir "$0-read-only"
mount -t tmpfs -o ro none "$0-read-only"
mount -t tmpfs -o {options} none "$0"
"$@"
status=$?
cp -r "$0" "$0-at-the-end"
exit $status
"""


def small_disk(folder: Path, options: str, command: list[str]) -> list[str]:
    """The command, with a disk at ``folder``, such as ``size=8m``."""
    return ["unshare", "-rm", "bash", "-c", ON_A_SMALL_DISK.format(options=options), str(folder), *command]


def trained_on(options: str, launcher: Launcher, run: Path, episodes: int, *overrides: str) -> tuple[str, Path]:
    """What a run says whose checkpoints go to such a disk, and what is left there; it must go on to its end."""
    (run / "try").mkdir(parents=True)
    tried = subprocess.run(small_disk(run / "try", "size=1m", ["true"]), capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no disk can be mounted here, not even in a name space of one's own: {tried.stderr.strip()}")
    disk = run / "save_model"
    disk.mkdir()
    ended = subprocess.run(
        small_disk(disk, options, launcher.command(run, *SMALL, f"runtime_args.num_episode={episodes}", *overrides)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert "Traceback" not in ended.stderr
    assert sorted(metrics(run)) == list(range(1, episodes + 1)), "it went on without the disk"
    assert ended.returncode == 1, "the end of the run is not on the disk"
    assert f"checkpoint {episodes} was not saved" in ended.stderr, ended.stderr
    assert any("checkpoint/failed" in numbers for numbers in metrics(run).values())
    return ended.stderr, disk.with_name("save_model-at-the-end") / "policy_trainer"


def test_what_does_not_fit_is_not_begun_and_what_was_saved_stays(launcher: Launcher, tmp_path: Path) -> None:
    """The copy of the counters goes to the disk that can only be read."""
    elsewhere = tmp_path / "run" / "save_model-read-only" / "counters"
    said, root = trained_on(TWO_FIT, launcher, tmp_path / "run", 4, f"runtime_args.data_checkpoint_path={elsewhere}")
    assert said.count(f"is complete; but {elsewhere}: cannot be written: [Errno 30] Read-only file system") == 2
    assert f"{root.parent.with_name('save_model')}/policy_trainer: the next checkpoint needs" in said
    assert "nothing of it was written" in said
    assert "checkpoint 2 gets no Hugging Face directory" in said
    assert said.count("was not saved") == 2
    saved = list_complete(root)
    assert [folder.name for folder in saved] == ["1", "2"]
    assert [(folder / HUGGING_FACE_FOLDER).exists() for folder in saved] == [True, False]
    assert lost(root, saved) == []
    assert (root / "latest").read_text().strip() == "2"
    assert list(root.glob(f"{STAGING_PREFIX}*")) == []


def test_a_disk_that_is_full_in_the_middle_of_a_save_is_told_of(launcher: Launcher, tmp_path: Path) -> None:
    """Weights and moments would just fit, but not what comes with them."""
    numbers = 3 * 4 * num_parameters(ROOT / "embedded" / "tiny_qwen3")
    said, root = trained_on(
        f"size={numbers + A_LITTLE}", launcher, tmp_path / "run", 3, "models.policy_trainer.save_hf=False"
    )
    assert said.count("was not saved") == 3
    assert "cannot be written" in said
    assert "No space left on device" in said
    assert list_complete(root) == ()
    assert not (root / "latest").exists()
    assert not any(path.is_file() for path in root.rglob("*")), "what was begun takes no room any more"
