"""Killing the driver or a trainer rank of a run that saves after every episode, and looking at what is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runs import START_TIMEOUT_S, actors, descendants, finish, metrics, survivors, wait_until

from chatlearn.checkpoint.durable import STAGING_PREFIX
from chatlearn.checkpoint.layout import list_complete
from chatlearn.checkpoint.manifest import read_manifest, verify_checksums
from chatlearn.config.layout import TRAINER_CHECKPOINTS
from chatlearn.errors import CheckpointError

Deed = Literal["driver", "rank", "driver in a save", "rank in a save", "driver at the start"]
DEEDS: tuple[Deed, ...] = ("driver in a save", "driver at the start", "rank in a save", "rank", "driver")

# Seconds from the moment that is waited for to the kill, at most. A save of a tiny model takes some tenths, an episode
# about one, a start some tens.
LONGEST_DELAY_S: dict[Deed, float] = {
    "driver": 1.5,
    "rank": 1.5,
    "driver in a save": 0.3,
    "rank in a save": 0.3,
    "driver at the start": 20.0,
}
# What a life trains before it is killed, at most, also on a machine that is faster than ours.
LONGEST_LIFE: dict[Deed, int] = {
    "driver": 5,
    "rank": 5,
    "driver in a save": 3,
    "rank in a save": 3,
    "driver at the start": 0,
}
GONE_WITHIN_S = 10.0
LOOK_S = 0.005  # Saves are short.
LONGEST_NAME = 120  # characters of a command line


@dataclass(frozen=True)
class Kill:
    """What was done, when, what was being saved then, and what is wrong with what was left.

    ``episode`` is the last whose numbers were on the disk. ``unfinished`` is the iteration whose checkpoint was in the
    making, ``-`` where none was.
    """

    deed: Deed
    rank: int
    episode: int
    delay_s: float
    unfinished: str
    problems: tuple[str, ...]


def episodes_for(deeds: Iterable[Deed]) -> int:
    """How long a run must be for these kills, and for an episode after the last of them."""
    return sum(LONGEST_LIFE[deed] for deed in deeds) + 1


def kill(output: Path, run: subprocess.Popen[str], deed: Deed, chance: random.Random, keep: int) -> Kill:
    """Wait for the moment, kill, see everybody out, and look whether all that was published is still there.

    ``keep`` is the run's ``keep_checkpoints``: of those that may be deleted, only the newest must be there.
    """
    delay = chance.uniform(0.0, LONGEST_DELAY_S[deed])
    root = output / TRAINER_CHECKPOINTS
    if deed != "driver at the start":
        # The first save of this life: from now on everything in the folder is of this life.
        before = newest(root)
        wait_until(lambda: newest(root) > before, run, "a checkpoint")
    if "save" in deed:
        await_quickly(lambda: bool(unfinished(root)), run)
    time.sleep(delay)
    rank = chance.choice([0, 1]) if "rank" in deed else -1
    victim = run.pid if rank < 0 else pid_of_rank(output, rank)
    everybody, published = descendants(run), list_complete(root)
    os.kill(victim, signal.SIGKILL)
    ended = finish(run)
    problems = [f"{line[:LONGEST_NAME]} lives on" for line in survivors(everybody, GONE_WITHIN_S)]
    if rank < 0 and ended.returncode != -signal.SIGKILL:
        problems.append(f"the driver ended with status {ended.returncode}")
    if rank >= 0 and (ended.returncode != 1 or f"policy_trainer rank {rank}" not in ended.stderr):
        problems.append(f"status {ended.returncode} without a word of rank {rank}: {ended.stderr[-500:]}")
    problems += lost(root, published if keep == 0 else published[-1:])
    episode = max(metrics(output), default=0)
    return Kill(deed, rank, episode, round(delay, 2), unfinished(root) or "-", tuple(problems))


def newest(root: Path) -> int:
    """The iteration of the newest complete checkpoint; 0 where there is none."""
    return max((int(folder.name) for folder in list_complete(root)), default=0)


def unfinished(root: Path) -> str:
    """The iteration whose checkpoint is in the making; nothing where none is."""
    return next((path.name.removeprefix(STAGING_PREFIX) for path in root.glob(f"{STAGING_PREFIX}*")), "")


def await_quickly(condition: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    """Wait for something that does not last."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert run.poll() is None, f"the run ended before: {run.communicate()[1]}"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(LOOK_S)


def pid_of_rank(output: Path, rank: int) -> int:
    """The process of a trainer rank."""
    (pid,) = (row["pid"] for row in actors(output) if (row["role"], row["rank"]) == ("policy_trainer", rank))
    return pid


def lost(root: Path, published: tuple[Path, ...]) -> list[str]:
    """Which of the checkpoints that were published are not there any more, whole and with the bytes they had."""
    problems: list[str] = []
    for folder in published:
        try:
            verify_checksums(folder, read_manifest(folder).files)
        except (CheckpointError, OSError) as error:
            problems.append(f"checkpoint {folder.name} was published and is lost: {error}")
    return problems
