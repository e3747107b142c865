"""``chatlearn resume-check``: what the command line asks for, without the printing."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chatlearn.checkpoint.layout import latest_complete
from chatlearn.checkpoint.manifest import MANIFEST_NAME, read_manifest
from chatlearn.checkpoint.room import free_bytes, in_words
from chatlearn.cluster.watchdog import start_watchdog
from chatlearn.config.layout import TRAINER_CHECKPOINTS, Layout
from chatlearn.config.schedule import ScheduleName, schedule_name
from chatlearn.config.schema import GrpoConfig
from chatlearn.disk_room import size_of_checkpoint
from chatlearn.errors import ConfigError, RunError
from chatlearn.resume_check.child import started
from chatlearn.resume_check.comparison import Comparison, compare_runs
from chatlearn.resume_check.trial import Trial, prepare_folder

Say = Callable[[str], None]

EXPECTED: Final = "a difference is expected and no fault of the resume: no prompt is lost or learned from twice"
CLOCK: Final = f"the clock decides what is learned from, in every run anew; {EXPECTED}"
# Why a schedule does not repeat everything; nothing where it does.
WARNINGS: Final[dict[ScheduleName, str]] = {"over_sampling": CLOCK, "async": CLOCK}
ACCELERATOR: Final = "accelerators may add in an order of their own; only on the CPU nothing may differ in any case"


@dataclass(frozen=True)
class Left:
    """The checkpoint that a killed run left, and which file its manifest is: saved once more it is another one."""

    folder: Path
    inode: int
    written_ns: int

    @staticmethod
    def of(folder: Path) -> Left:
        """What lies in ``folder`` now."""
        found = (folder / MANIFEST_NAME).stat()
        return Left(folder, found.st_ino, found.st_mtime_ns)


def resume_check(trial: Trial, say: Say) -> Comparison:
    """Run uninterrupted, run and kill, run on, compare.

    Raises ``RunError`` where a run fails, ends before it is killed, or begins anew instead of going on.
    """
    prepare_folder(trial.root)
    start_watchdog(os.getpid())  # If we are killed, the run that is going on goes too.
    with _stage(say, f"1 of 3: {trial.episodes} episodes without interruption"):
        _run(trial, trial.uninterrupted, "uninterrupted")
    with _stage(say, f"2 of 3: the same, killed once episode {trial.cut} is saved"):
        left = _run_until_saved(trial)
    with _stage(say, "3 of 3: the same command again, to the end"):
        _run(trial, trial.interrupted, "resumed")
    require_resumed(trial, left)
    say(f"both runs and their messages are in {trial.root}, which may be removed")
    return compare_runs(trial.uninterrupted, trial.interrupted)


def require_room(config: GrpoConfig, layout: Layout, trial: Trial) -> None:
    """Raise ``ConfigError`` where the checkpoints of both runs do not fit; what an earlier check left goes before."""
    size = size_of_checkpoint(config, layout)
    num_saves = -(-trial.episodes // trial.cut)  # the last episode is saved in any case
    needed = 2 * num_saves * size.total
    free = free_bytes(trial.root) + sum(path.lstat().st_size for path in trial.root.rglob("*"))
    if free < needed:
        raise ConfigError(
            f"{trial.root}: the check needs {in_words(needed)} for {num_saves} checkpoints of each of two runs, and "
            f"{in_words(free)} are free on that disk; use a larger --cut, fewer --episodes, or another output_dir"
        )


def warnings_of(config: GrpoConfig, layout: Layout) -> list[str]:
    """What lets one expect a difference before anything runs."""
    name = schedule_name(config)
    found = [f"{name}: {WARNINGS[name]}"] if name in WARNINGS else []
    return [*found, ACCELERATOR] if layout.device_kind != "cpu" else found


@contextmanager
def _stage(say: Say, what: str) -> Generator[None]:
    say(what)
    begun = time.monotonic()
    yield
    say(f"  after {time.monotonic() - begun:.0f} s")


def _run(trial: Trial, output: Path, name: str) -> None:
    with started(trial.command(output), trial.log(name)) as child:
        child.finish()


def _run_until_saved(trial: Trial) -> Left:
    checkpoints = trial.interrupted / TRAINER_CHECKPOINTS

    def saved_episode() -> int:
        newest = latest_complete(checkpoints)
        return 0 if newest is None else read_manifest(newest).episode

    with started(trial.command(trial.interrupted), trial.log("killed")) as child:
        child.wait_for(lambda: saved_episode() >= trial.cut, f"episode {trial.cut} was saved too late")
        child.kill()
    if saved_episode() != trial.cut:
        raise RunError(
            f"episode {saved_episode()} was saved before the run could be killed after {trial.cut}; use a larger --cut"
        )
    newest = latest_complete(checkpoints)
    assert newest is not None, "its episode was read above"
    return Left.of(newest)


def require_resumed(trial: Trial, left: Left) -> None:
    """Raise ``RunError`` where the last run did not go on from what was left.

    One that begins anew comes out equal too, and says nothing about a resume.
    """
    log = trial.log("resumed")
    told = log.read_text(encoding="utf-8", errors="replace")
    if not re.search(rf"resumed from .*, after episode {trial.cut}\b", told):
        raise RunError(
            f"the run that was to go on after episode {trial.cut} began elsewhere, which proves nothing: {log} names "
            "no checkpoint of it that it resumed from"
        )
    if Left.of(left.folder) != left:
        raise RunError(
            f"the run that was to go on from {left.folder} has saved that one again, which proves nothing; see {log}"
        )
