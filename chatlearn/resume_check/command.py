"""``chatlearn resume-check``: what the command line asks for, without the printing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, get_args

from chatlearn.checkpoint.layout import latest_complete
from chatlearn.checkpoint.manifest import read_manifest
from chatlearn.checkpoint.room import free_bytes, in_words
from chatlearn.checkpoint.run_state import load_run_state
from chatlearn.cluster.watchdog import start_watchdog
from chatlearn.config.layout import TRAINER_CHECKPOINTS, Layout
from chatlearn.config.schedule import ScheduleName, schedule_name
from chatlearn.config.schema import GrpoConfig
from chatlearn.disk_room import size_of_checkpoint
from chatlearn.errors import ConfigError, RunError
from chatlearn.observability.sinks import metrics_path
from chatlearn.resume_check.child import started
from chatlearn.resume_check.comparison import Comparison, Kind, compare_runs
from chatlearn.resume_check.trial import Trial, prepare_folder

Say = Callable[[str], None]

EXPECTED: Final = "a difference is expected and no fault of the resume: no prompt is lost or learned from twice"
CLOCK: Final = f"the clock decides what is learned from, in every run anew; {EXPECTED}"
# Why a schedule does not repeat everything; nothing where it does.
WARNINGS: Final[dict[ScheduleName, str]] = {"over_sampling": CLOCK, "async": CLOCK}
ACCELERATOR: Final = "accelerators may add in an order of their own; only on the CPU nothing may differ in any case"


def resume_check(trial: Trial, say: Say) -> Comparison:
    """Run uninterrupted, run and kill, run on, compare.

    Raises ``RunError`` where a run fails or ends before it is killed, does not go on, or leaves nothing to compare.
    """
    prepare_folder(trial.root)
    start_watchdog(os.getpid())  # If we are killed, the run that is going on goes too.
    with _stage(say, f"1 of 3: {trial.episodes} episodes without interruption"):
        _run(trial, trial.uninterrupted, "uninterrupted")
    with _stage(say, f"2 of 3: the same, killed once episode {trial.cut} is saved"):
        _run_until_saved(trial)
        begun = metrics_at_save(trial.interrupted)
    with _stage(say, "3 of 3: the same command again, to the end"):
        _run(trial, trial.interrupted, "resumed")
    require_gone_on(trial.interrupted, begun)
    say(f"both runs and their messages are in {trial.root}, which may be removed")
    comparison = compare_runs(trial.uninterrupted, trial.interrupted)
    require_proof(comparison, trial)
    return comparison


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


def _run_until_saved(trial: Trial) -> None:
    run = trial.interrupted
    with started(trial.command(run), trial.log("killed")) as child:
        child.wait_for(lambda: saved_episode(run) >= trial.cut, f"episode {trial.cut} was saved too late")
        child.kill()
    child.require_killed()
    if saved_episode(run) != trial.cut:
        raise RunError(
            f"episode {saved_episode(run)} was saved before the run could be killed after {trial.cut}; use a larger "
            "--cut"
        )


def saved_episode(run: Path) -> int:
    """The episode of the newest checkpoint in a run's directory, 0 where there is none."""
    newest = latest_complete(run / TRAINER_CHECKPOINTS)
    return 0 if newest is None else read_manifest(newest).episode


def metrics_at_save(run: Path) -> bytes:
    """What a run had written of its metrics when it saved its newest checkpoint."""
    newest = latest_complete(run / TRAINER_CHECKPOINTS)
    assert newest is not None, "it was killed once it had saved"
    return metrics_path(run).read_bytes()[: load_run_state(newest).metrics_bytes]


def require_gone_on(run: Path, begun: bytes) -> None:
    """Raise ``RunError`` where a run did not go on after the metrics ``begun``, but made those episodes anew.

    It would come to the same numbers, and prove nothing. The seconds in them are of the first process alone.
    """
    if not metrics_path(run).read_bytes().startswith(begun):
        raise RunError(f"the run in {run} did not go on from its checkpoint, but began anew: nothing was resumed")


def require_proof(comparison: Comparison, trial: Trial) -> None:
    """Raise ``RunError`` where nothing differs because too little was compared."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    missing = [kind.replace("_", " ") for kind in kinds if kind not in comparison.counts]
    if saved_episode(trial.interrupted) != trial.episodes:
        missing.append(f"a checkpoint after episode {trial.episodes}")
    if comparison.equal and missing:
        raise RunError(f"nothing was proved: in {trial.root} there was nothing to compare of {', '.join(missing)}")
