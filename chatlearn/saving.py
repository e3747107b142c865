"""What a run keeps: checkpoints to go on from, and capsules of single steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from chatlearn.checkpoint import capsule
from chatlearn.checkpoint.adapters import AdapterRecord
from chatlearn.checkpoint.durable import failures_named
from chatlearn.checkpoint.layout import (
    begin,
    checkpoint_folder,
    discard,
    latest_complete,
    point_latest,
    prune,
    publish,
)
from chatlearn.checkpoint.manifest import FileRecord, Manifest, read_manifest
from chatlearn.checkpoint.room import require_room
from chatlearn.checkpoint.run_state import RunState, save_config, save_counters, save_run_state
from chatlearn.cluster.archive import Draft
from chatlearn.cluster.exporter import Export
from chatlearn.config.schema import RuntimeArgs
from chatlearn.errors import CheckpointError, RunError
from chatlearn.models.family import family_of
from chatlearn.observability.journal import Journal, Page
from chatlearn.records import Sample
from chatlearn.team import Team

# A single step may meet an odd batch. Weights do not change in a skipped step, so several in a row are the weights.
MAX_BAD_STEPS = 5


def save(team: Team, state: RunState, journal: Journal) -> None:
    """Begin a checkpoint of ``state``, unless there is one already; training goes on while it is written.

    The metrics of its episode are on disk before, and the checkpoint knows how long that file was. Everything that
    resume needs lies in the one folder; ``data_checkpoint_path`` gets a copy for people.
    """
    if state.train_iteration == 0:
        return
    begun, root = time.perf_counter(), team.layout.folders.save_model
    with journal.phase("saving"):
        team.archive.settle()
        if _is_saved(root, state):
            return
        state = replace(state, metrics_bytes=journal.metrics_bytes)
        try:
            require_room(root, team.checkpoint_bytes)
            staging = begin(root, state.train_iteration)
            save_run_state(staging, state)
            save_config(staging, team.config_text)
        except CheckpointError as error:
            discard(root, state.train_iteration)
            team.archive.mourn(state.train_iteration, error)
        else:
            team.archive.begin(_draft(team, state, journal, staging))
    journal.write(state.episode, {"time/save": time.perf_counter() - begun})


def _is_saved(root: Path, state: RunState) -> bool:
    """Whether the newest checkpoint is of this episode.

    One of the same weights may be of an earlier one, since an episode can go by without an optimizer step. It is
    replaced: a run whose last episodes did so would otherwise never be known to have ended.
    """
    folder = checkpoint_folder(root, state.train_iteration)
    return latest_complete(root) == folder and read_manifest(folder).episode == state.episode


def _draft(team: Team, state: RunState, journal: Journal, staging: Path) -> Draft:
    """What becomes of the staged checkpoint: it is published, and then the oldest one goes."""
    root, base = team.layout.folders.save_model, Path(team.layout.trainer.load)
    adapter = AdapterRecord.of(team.lora, base)
    manifest = Manifest(
        iteration=state.train_iteration,
        episode=state.episode,
        base_model=str(base.resolve()),
        architecture=family_of(base).architecture,
        groupgemm=team.layout.trainer.groupgemm,
        num_ranks=team.layout.trainer.num_ranks,
        adapter=adapter,
        provenance=team.provenance,
    )

    def complete(files: Sequence[FileRecord]) -> None:
        publish(root, replace(manifest, files=tuple(files)))
        for deed in (  # One that fails is told of and keeps nobody from the next: to prune is what makes room.
            lambda: point_latest(root, state.train_iteration),
            lambda: prune(root, team.args.keep_checkpoints, team.args.keep_best),
            lambda: save_counters(team.layout.folders.data_checkpoint, state),
        ):
            try:
                with failures_named(root):
                    deed()
            except CheckpointError as error:
                journal.say(f"checkpoint {state.train_iteration} is complete; but {error}")

    export = Export(base, adapter) if team.saves_hugging_face else None
    return Draft(state.train_iteration, staging, export, complete)


def begin_capsule(team: Team, page: Page, iteration: int) -> bool:
    """Begin to keep what a step consumes: the weights, which must be those that the step begins with.

    Returns whether that could be done. What is kept is for people: a full disk is told of, and ends no run.
    """
    with page.phase("capsule"):
        try:
            staging = capsule.begin_capsule(_capsules(team), iteration)
            team.trainer.save_capsule(Path(team.layout.trainer.load), staging)
        except CheckpointError as error:
            _give_up_capsule(team, page, iteration, error)
            return False
    return True


def finish_capsule(team: Team, page: Page, samples: Sequence[Sample], facts: capsule.CapsuleFacts) -> None:
    """Add the rest, and tell how it can be run again; of those of the interval the oldest goes."""
    root = _capsules(team)
    with page.phase("capsule"):
        try:
            folder = capsule.publish_capsule(root, facts, samples, team.config_text)
        except CheckpointError as error:
            _give_up_capsule(team, page, facts.iteration, error)
            return
        page.say(f"what step {facts.iteration} consumed is kept; run it again with: chatlearn replay {folder}")
        try:
            with failures_named(root):
                capsule.prune(root, facts.iteration, team.args.keep_checkpoints)
        except CheckpointError as error:
            page.say(f"older capsules stay: {error}")


def _give_up_capsule(team: Team, page: Page, iteration: int, error: CheckpointError) -> None:
    capsule.discard_capsule(_capsules(team), iteration)
    page.say(f"what step {iteration} consumed is not kept: {error}. The run goes on")


def require_finite_steps(team: Team, iteration: int) -> None:
    """Raise ``RunError`` when steps keep going wrong, up to ``iteration``: nothing is learned any more."""
    if team.trainer.num_bad_in_a_row < MAX_BAD_STEPS:
        return
    folder = capsule.capsule_folder(_capsules(team), iteration)
    look = f"; chatlearn replay {folder} names the parameters" if folder.is_dir() else ""
    raise RunError(
        f"the gradients of the last {MAX_BAD_STEPS} optimizer steps, up to step {iteration}, are not finite, and the "
        f"steps were skipped{look}. Lower models.policy_trainer.optimizer.lr, or go back with "
        "runtime_args.load_data_checkpoint_iteration"
    )


def _capsules(team: Team) -> Path:
    return team.layout.folders.output / capsule.CAPSULES_FOLDER


def is_save_due(args: RuntimeArgs, episode: int) -> bool:
    """At every interval and at the end; an interval of 0 never saves."""
    interval = args.save_episode_interval
    return is_due(episode, interval) or (interval > 0 and episode == args.num_episode)


def is_due(episode: int, interval: int) -> bool:
    """Whether something that happens every ``interval`` episodes (0: never) happens now."""
    return interval > 0 and episode % interval == 0
