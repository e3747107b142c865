"""What a check runs: the user's own command, with the few keys that both runs must have alike."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from chatlearn.checkpoint.documents import integer, read_document, text
from chatlearn.checkpoint.durable import write_text
from chatlearn.config.aliases import SPELLINGS
from chatlearn.config.schema import GrpoConfig
from chatlearn.errors import CheckpointError, ConfigError

# Inside the run's directory; whoever removes it loses nothing but the check.
FOLDER: Final = "resume_check"
OWNER_NAME: Final = "resume_check.json"
ENTRYPOINT: Final = Path(__file__).resolve().parents[1] / "entrypoint.py"
RUNTIME: Final = "runtime_args"
LOG: Final = f"{RUNTIME}.log_args_dict"
# Who asks for one of these in so many words would get another answer than the question.
NOT_TO_CHOOSE: Final = tuple(
    f"{RUNTIME}.{name}" for name in ("num_episode", "save_episode_interval", "keep_checkpoints")
)


@dataclass(frozen=True)
class Trial:
    """A check: ``episodes`` of the command with ``file`` and ``overrides``, killed once ``cut`` of them are saved.

    ``root`` is the folder that everything goes to.
    """

    file: Path
    overrides: tuple[str, ...]
    episodes: int
    cut: int
    root: Path

    @property
    def uninterrupted(self) -> Path:
        """The output directory of the run that nobody disturbs."""
        return self.root / "uninterrupted"

    @property
    def interrupted(self) -> Path:
        """The output directory of the run that is killed and goes on."""
        return self.root / "interrupted"

    def log(self, name: str) -> Path:
        """The file with the messages of one of the runs."""
        return self.root / f"{name}.log"

    def settings(self, output: Path) -> dict[str, str]:
        """The keys that the check sets itself, with the values of the run that writes to ``output``."""
        return {
            # Both runs are told the same end, for learning-rate schedules look at it, and save at the same places.
            f"{RUNTIME}.num_episode": str(self.episodes),
            f"{RUNTIME}.save_episode_interval": str(self.cut),
            f"{RUNTIME}.keep_checkpoints": "0",
            # All are kept anyway, and there is none to go back to.
            f"{RUNTIME}.keep_best": "null",
            f"{RUNTIME}.load_data_checkpoint_iteration": "null",
            f"{RUNTIME}.enable_resume_training": "True",
            f"{RUNTIME}.save_rollouts": "True",
            f"{RUNTIME}.data_checkpoint_path": str(output / "data_checkpoint_path"),
            f"{LOG}.enable_tensorboard": "False",
            f"{LOG}.enable_wandb": "False",
        }

    def words(self, output: Path) -> list[str]:
        """The overrides of the run that writes to ``output``: those of the user, and ours."""
        words = [f"{key}={value}" for key, value in self.settings(output).items()]
        return [*self.overrides, *words, f"{RUNTIME}.output_dir={output}"]

    def command(self, output: Path) -> list[str]:
        """The command line that trains into ``output``; a repetition of it goes on from there."""
        start = (sys.executable, str(ENTRYPOINT), "grpo", "--config-file", str(self.file))
        return [*start, *self.words(output)]


def trial_of(config: GrpoConfig, file: Path, overrides: Sequence[str], episodes: int, cut: int) -> Trial:
    """The check of ``config``, which ``file`` and ``overrides`` say; a ConfigError lists all that is wrong."""
    root = Path(config.runtime_args.output_dir) / FOLDER
    trial = Trial(file, tuple(overrides), episodes, cut, root)
    problems: list[str] = []
    if not 1 <= cut < episodes:
        problems.append(
            f"--cut {cut} must be at least 1 and less than --episodes {episodes}: the run is killed after so many "
            "episodes, and goes on from there"
        )
    ours = {spelling: key for key in NOT_TO_CHOOSE for spelling in SPELLINGS.get(key, (key,))}
    problems += [
        f"{word} cannot be chosen: the check sets {ours[key]} itself; leave it out"
        for word in overrides
        if (key := word.partition("=")[0]) in ours
    ]
    stranger = _stranger(root)
    if stranger:
        problems.append(stranger)
    if problems:
        raise ConfigError(*problems)
    return trial


def _stranger(root: Path) -> str:
    """Why the folder may not be replaced; nothing where it may."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return ""
    try:
        owner = read_document(root / OWNER_NAME)
        host, pid = text(owner, "host", root / OWNER_NAME), integer(owner, "pid", root / OWNER_NAME)
        begun = text(owner, "begun", root / OWNER_NAME)
    except CheckpointError:
        return f"{root} is in the way, and no check of a resume made it; move it away, or choose another output_dir"
    if host == socket.gethostname() and begun == _begun(pid):
        return f"{root} is in use by another check, process {pid} on {host}; wait for its end"
    return ""


def _begun(pid: int) -> str:
    """When a process began, which tells it from a later one with its number; empty where there is none."""
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return ""


def prepare_folder(root: Path) -> None:
    """Make an empty folder that is ours, in the place of what an earlier check left there."""
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "begun": _begun(os.getpid())}
    write_text(root / OWNER_NAME, json.dumps(owner) + "\n")
