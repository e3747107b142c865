"""``chatlearn replay``: what the command line asks for, without the printing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from chatlearn.checkpoint.capsule import Capsule, changed_versions, read_capsule, readable_numbers, verify_capsule
from chatlearn.config.environment import Launcher, visible_gpus
from chatlearn.errors import ConfigError
from chatlearn.replay.comparison import Comparison, Say, climb
from chatlearn.replay.ladder import ladder
from chatlearn.replay.measure import measure
from chatlearn.replay.ranks import join
from chatlearn.replay.trial import Trial, trial_of
from chatlearn.trainer.parallel import Rendezvous, close_process_group


def replay(directory: Path, overrides: Sequence[str], say: Say) -> dict[str, object] | None:
    """Compute the recorded step in this process, or under ``torchrun`` with the others.

    The result is what the step reports, for JSON; ``None`` on every rank but the first, which speaks for all.
    """
    launcher = Launcher.read()
    speaks = launcher.rank == 0
    capsule = _open(directory, say) if speaks else read_capsule(directory)
    trial = trial_of(capsule, overrides, launcher.num_ranks)
    with tempfile.TemporaryDirectory(prefix="chatlearn-replay-") as folder:
        place = launcher.meeting or f"file://{Path(folder) / 'meeting'}"
        join(launcher.rank, launcher.local_rank, launcher.num_ranks, Rendezvous(place, trial.device_kind))
        document = _document(capsule, trial)
        close_process_group()
    return document if speaks else None


def compare(directory: Path, overrides: Sequence[str], say: Say) -> Comparison:
    """Compute the recorded step in every way that must give the same; starts the ranks it needs."""
    if Launcher.read().num_ranks > 1:
        raise ConfigError("replay --compare starts its own ranks; run it without torchrun")
    capsule = _open(directory, say)
    trial = trial_of(capsule, overrides, num_ranks=1)
    num_devices = visible_gpus() if trial.device_kind == "cuda" else None
    return climb(ladder(trial, num_devices), capsule.samples, say)


def _open(directory: Path, say: Say) -> Capsule:
    """Read every byte of the capsule once before anything is computed from it."""
    capsule = read_capsule(directory)
    verify_capsule(capsule)
    changes = changed_versions(capsule)
    if changes:
        say(f"recorded with other versions: {'; '.join(changes)}")
    return capsule


def _document(capsule: Capsule, trial: Trial) -> dict[str, object]:
    recorded = {"recorded": dict(capsule.stats)} if capsule.stats else {}
    return {
        **readable_numbers(vars(measure(trial))),
        "iteration": capsule.iteration,
        "reason": capsule.reason,
        **recorded,
    }
