"""``chatlearn resume-check``: what the command line asks for, without the printing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from chatlearn.checkpoint.layout import latest_complete
from chatlearn.checkpoint.manifest import read_manifest
from chatlearn.cluster.watchdog import start_watchdog
from chatlearn.config.layout import TRAINER_CHECKPOINTS, Layout
from chatlearn.config.schedule import ScheduleName, schedule_name
from chatlearn.config.schema import GrpoConfig
from chatlearn.errors import RunError
from chatlearn.resume_check.child import started
from chatlearn.resume_check.comparison import Comparison, compare_runs
from chatlearn.resume_check.trial import Trial, prepare_folder

Say = Callable[[str], None]

EXPECTED: Final = "a difference is expected and no fault of the resume: no prompt is lost or learned from twice"
CLOCK: Final = f"the clock decides what is learned from, in every run anew; {EXPECTED}"
# Why a schedule does not repeat everything; nothing where it does.
WARNINGS: Final[dict[ScheduleName, str]] = {"over_sampling": CLOCK, "async": CLOCK}
ACCELERATOR: Final = "accelerators may add in an order of their own; only on the CPU nothing may differ in any case"


def resume_check(trial: Trial, say: Say) -> Comparison:
    """Run uninterrupted, run and kill, run on, compare.

    Raises ``RunError`` where a run fails or ends before it is killed.
    """
    prepare_folder(trial.root)
    start_watchdog(os.getpid())  # If we are killed, the run that is going on goes too.
    with _stage(say, f"1 of 3: {trial.episodes} episodes without interruption"):
        _run(trial, trial.uninterrupted, "uninterrupted")
    with _stage(say, f"2 of 3: the same, killed once episode {trial.cut} is saved"):
        _run_until_saved(trial)
    with _stage(say, "3 of 3: the same command again, to the end"):
        _run(trial, trial.interrupted, "resumed")
    say(f"both runs and their messages are in {trial.root}, which may be removed")
    return compare_runs(trial.uninterrupted, trial.interrupted)


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
    with started(trial.command(output), trial.root / f"{name}.log") as child:
        child.finish()


def _run_until_saved(trial: Trial) -> None:
    checkpoints = trial.interrupted / TRAINER_CHECKPOINTS

    def saved_episode() -> int:
        newest = latest_complete(checkpoints)
        return 0 if newest is None else read_manifest(newest).episode

    with started(trial.command(trial.interrupted), trial.root / "killed.log") as child:
        child.wait_for(lambda: saved_episode() >= trial.cut, f"episode {trial.cut} was saved too late")
        child.kill()
    if saved_episode() != trial.cut:
        raise RunError(
            f"episode {saved_episode()} was saved before the run could be killed after {trial.cut}; use a larger --cut"
        )
