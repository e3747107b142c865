"""What a run keeps: the state it goes on from, and the checkpoints that carry it."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from chatlearn.checkpoint import capsule
from chatlearn.checkpoint.adapters import AdapterRecord, require_same_adapter
from chatlearn.checkpoint.durable import write_text
from chatlearn.checkpoint.layout import (
    HUGGING_FACE_FOLDER,
    begin,
    checkpoint_folder,
    latest_complete,
    prune,
    publish,
    recover,
)
from chatlearn.checkpoint.manifest import Manifest, read_manifest
from chatlearn.checkpoint.run_state import RunState, load_run_state, save_run_state
from chatlearn.config.layout import Layout
from chatlearn.config.schema import GrpoConfig, RuntimeArgs
from chatlearn.config.text import resolved_text
from chatlearn.errors import ConfigError, RunError
from chatlearn.models.family import family_of
from chatlearn.observability.journal import Journal, Page
from chatlearn.observability.manifest import RunFacts, write_manifest
from chatlearn.recipe import lora_spec
from chatlearn.records import Sample
from chatlearn.specs import journal_spec
from chatlearn.team import Team

# A single step may meet an odd batch. Weights do not change in a skipped step, so several in a row are the weights.
MAX_BAD_STEPS = 5

FRESH = RunState(episode=0, train_iteration=0, policy_version=0, epoch=0, offset=0, deferred=(), metrics_bytes=0)


def beginning(config: GrpoConfig, layout: Layout) -> RunState:
    """Where the run begins, after what an earlier one was in the middle of has been finished."""
    recover(layout.folders.save_model)
    return state_found(config, layout)


def state_found(config: GrpoConfig, layout: Layout) -> RunState:
    """The state in the newest complete checkpoint, or a fresh one; only reads, so that a dry run disturbs nobody.

    Raises ``ConfigError`` when resuming is switched off and the output directory holds checkpoints of another run, and
    ``CheckpointError`` when what was trained there is not what is to be trained now.
    """
    newest = latest_complete(layout.folders.save_model)
    if newest is None:
        return FRESH
    if not config.runtime_args.enable_resume_training:
        raise ConfigError(
            f"runtime_args.output_dir={config.runtime_args.output_dir} holds the checkpoint {newest.name} of an "
            "earlier run, and runtime_args.enable_resume_training=False; choose another output_dir, "
            "or let the run continue"
        )
    manifest, base = read_manifest(newest), Path(layout.trainer.load)
    require_same_adapter(newest, manifest.adapter, AdapterRecord.of(lora_spec(config), base), manifest.base_model)
    return load_run_state(newest)


def announce(text: str) -> None:
    """Tell something that belongs to no journal."""
    Console(stderr=True, highlight=False).print(text)


@contextmanager
def open_journal(config: GrpoConfig, layout: Layout, state: RunState) -> Generator[Journal]:
    """Write what the run is made of, and open its journal after the last episode that counts."""
    output, runtime = layout.folders.output, config.runtime_args
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "config.yaml", resolved_text(config))
    data = [*runtime.data_path.split(","), *(runtime.eval_data_path or "").split(",")]
    facts = RunFacts(
        model_path=Path(layout.trainer.load),
        data_paths=tuple(Path(path.strip()) for path in data if path.strip()),
        devices=(f"{layout.num_devices} x {layout.device_kind}",),
    )
    write_manifest(output, facts)
    with Journal.open(journal_spec(config, layout, state)) as journal:
        yield journal


def resume(team: Team, state: RunState, journal: Journal) -> None:
    """Load the weights, optimizer and random states that belong to ``state``; a fresh run has nothing to load."""
    if state.train_iteration == 0:
        return
    folder = checkpoint_folder(team.layout.folders.save_model, state.train_iteration)
    with team.trainer.resident():
        restored = team.trainer.load(folder)
    journal.say(f"resumed from {folder}, after episode {state.episode}")
    if not restored.random_states:
        journal.say(f"it was saved by {restored.num_ranks_saved} ranks: the trainer's random states begin anew")


def save(team: Team, state: RunState, journal: Journal) -> None:
    """Publish a checkpoint of ``state``, unless there is one already; then let the oldest go.

    The metrics of its episode are on disk before, and the checkpoint knows how long that file was. Everything that
    resume needs lies in the one folder; ``data_checkpoint_path`` gets a copy for people.
    """
    root = team.layout.folders.save_model
    if state.train_iteration == 0 or latest_complete(root) == checkpoint_folder(root, state.train_iteration):
        return
    begun = time.perf_counter()
    staging = begin(root, state.train_iteration)
    base = Path(team.layout.trainer.load)
    with journal.phase("saving"):
        files = team.trainer.save(staging)  # From wherever the shards lie: the engines may hold the device now.
        if team.saves_hugging_face:
            with team.trainer.weights_resident():
                team.trainer.save_hugging_face(base, staging / HUGGING_FACE_FOLDER)
    state = replace(state, metrics_bytes=journal.metrics_bytes)
    save_run_state(staging, state)
    manifest = Manifest(
        iteration=state.train_iteration,
        episode=state.episode,
        base_model=str(base.resolve()),
        architecture=family_of(base).architecture,
        groupgemm=team.layout.trainer.groupgemm,
        num_ranks=team.layout.trainer.num_ranks,
        files=files,
        adapter=AdapterRecord.of(team.lora, base),
    )
    publish(root, manifest)
    save_run_state(team.layout.folders.data_checkpoint, state)
    prune(root, team.args.keep_checkpoints)
    journal.write(state.episode, {"time/save": time.perf_counter() - begun})


def begin_capsule(team: Team, page: Page, iteration: int) -> None:
    """Begin to keep what a step consumes: the weights, which must be those that the step begins with."""
    with page.phase("capsule"):
        staging = capsule.begin_capsule(_capsules(team), iteration)
        team.trainer.save_capsule(Path(team.layout.trainer.load), staging)


def finish_capsule(team: Team, page: Page, samples: Sequence[Sample], facts: capsule.CapsuleFacts) -> None:
    """Add the rest, and tell how it can be run again.

    Raises ``RunError`` when steps keep going wrong: nothing is learned any more, and capsules would fill the disk.
    """
    with page.phase("capsule"):
        folder = capsule.publish_capsule(_capsules(team), facts, samples, team.config_text)
    page.say(f"what step {facts.iteration} consumed is kept; run it again with: chatlearn replay {folder}")
    if capsule.num_bad_in_a_row(_capsules(team), facts.iteration) >= MAX_BAD_STEPS:
        raise RunError(
            f"the gradients of the last {MAX_BAD_STEPS} optimizer steps, up to step {facts.iteration}, are not finite, "
            f"and the steps were skipped; chatlearn replay {folder} names the parameters. Lower "
            "models.policy_trainer.optimizer.lr, or go back to an earlier checkpoint by removing newer ones"
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
