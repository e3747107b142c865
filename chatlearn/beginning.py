"""Where a run begins: the state it goes on from, the journal it goes on with, the weights that belong to it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from chatlearn.checkpoint.adapters import AdapterRecord, require_same_adapter
from chatlearn.checkpoint.durable import write_text
from chatlearn.checkpoint.layout import ABANDONED, DAMAGED, called, checkpoint_folder, recover, set_aside
from chatlearn.checkpoint.manifest import Provenance, missed_by_others
from chatlearn.checkpoint.run_state import CONFIG_NAME, RunState
from chatlearn.checkpoint.selection import Choice, Saved, choose, newer_than, read_chosen, strangers
from chatlearn.config.layout import Layout
from chatlearn.config.schema import GrpoConfig
from chatlearn.config.text import resolved_text
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.observability.journal import Journal
from chatlearn.observability.manifest import RunFacts, write_manifest
from chatlearn.observability.sinks import last_step, metrics_path
from chatlearn.provenance import compare, problems_of, remarks_of
from chatlearn.recipe import lora_spec
from chatlearn.specs import journal_spec
from chatlearn.team import Team

FRESH = RunState(episode=0, train_iteration=0, policy_version=0, epoch=0, offset=0, deferred=(), metrics_bytes=0)


def beginning(config: GrpoConfig, layout: Layout, provenance: Provenance) -> RunState:
    """Where the run begins, after what an earlier one was in the middle of has been finished.

    Damaged checkpoints that are newer get another name, which is said, and the run goes on from the one before.
    """
    root = layout.folders.save_model
    recover(root)
    choice = choose(root)
    for damage in choice.damaged:
        put_aside(damage.folder, damage.reason)
    return _state_in(config, layout, provenance, choice)


def state_found(config: GrpoConfig, layout: Layout, provenance: Provenance) -> RunState:
    """As ``beginning``, and only reads, so that a dry run disturbs nobody."""
    choice = choose(layout.folders.save_model)
    for damage in choice.damaged:
        announce(f"the checkpoint {damage.folder} is damaged, and a run would put it aside: {damage.reason}")
    return _state_in(config, layout, provenance, choice)


def put_aside(folder: Path, reason: str) -> None:
    """Take a damaged checkpoint out of the way, and say so; nothing of it is deleted."""
    announce(f"a damaged checkpoint is put aside as {set_aside(folder, DAMAGED)}: {reason}")


def _state_in(config: GrpoConfig, layout: Layout, provenance: Provenance, choice: Choice) -> RunState:
    """The state in the checkpoint to go on from, or a fresh one.

    Raises ``ConfigError`` when resuming is switched off and the output directory holds checkpoints of another run, or
    when data, model or batch are not those of the checkpoint; ``CheckpointError`` when all are damaged, or when what
    was trained there is not what is to be trained now.
    """
    saved = _chosen(config, layout, choice.newest)
    _require_free_names(layout.folders.save_model, 0 if saved is None else saved.state.train_iteration)
    if saved is None:
        _require_none_lost(layout.folders.save_model, choice)
        return FRESH
    if not config.runtime_args.enable_resume_training:
        raise ConfigError(
            f"runtime_args.output_dir={config.runtime_args.output_dir} holds the checkpoint {saved.folder.name} of an "
            "earlier run, and runtime_args.enable_resume_training=False; choose another output_dir, "
            "or let the run continue"
        )
    missed = missed_by_others(saved.folder, saved.manifest)
    if missed is not None:
        announce(
            f"{saved.folder / missed} is not there as it was saved; a run needs it not, chatlearn convert makes it"
        )
    state = _continued(config, provenance, saved)
    manifest, base = saved.manifest, Path(layout.trainer.load)
    require_same_adapter(saved.folder, manifest.adapter, AdapterRecord.of(lora_spec(config), base), manifest.base_model)
    return state


def _chosen(config: GrpoConfig, layout: Layout, newest: Saved | None) -> Saved | None:
    """The newest checkpoint that can be believed, or the one that the user sends the run back to.

    A run goes back once: what it saves from then on says so, and the same command, after a crash, goes on from there.
    """
    goal, root = config.runtime_args.load_data_checkpoint_iteration, layout.folders.save_model
    if goal is None:
        return newest
    if newest is not None and newest.state.gone_back_to == goal:
        announce(f"the run has gone back to checkpoint {goal} before; it goes on from what it saved since")
        return newest
    chosen = read_chosen(root, goal)
    newer = [folder.name for folder in newer_than(root, goal)]
    if newer:
        announce(f"going back to checkpoint {goal}; newer ones are put aside when the run starts: {', '.join(newer)}")
    return replace(chosen, state=replace(chosen.state, gone_back_to=goal))


def _continued(config: GrpoConfig, provenance: Provenance, saved: Saved) -> RunState:
    """The saved state, once the configuration has been compared with the one that it was saved with."""
    comparison = compare(saved, config, provenance)
    if comparison is None:
        announce(f"{saved.folder} holds no {CONFIG_NAME} (an older version saved it): configurations are not compared")
        return saved.state
    if comparison.harmful and not config.runtime_args.resume_anyway:
        raise ConfigError(*problems_of(saved, comparison))
    for line in remarks_of(saved, comparison):
        announce(line)
    if comparison.moves_data:
        return replace(saved.state, offset=0, deferred=(), open_groups=())
    if comparison.asks_anew:  # As by another schedule.
        return replace(saved.state, schedule="")
    return saved.state


def _require_free_names(root: Path, iteration: int) -> None:
    """Better said now than when the first checkpoint is to be saved."""
    found = [str(folder) for folder in strangers(root, iteration)]
    if found:
        raise ConfigError(f"in the way of checkpoints to come, and none themselves: {', '.join(found)}; move them away")


def _require_none_lost(root: Path, choice: Choice) -> None:
    """A run whose checkpoints are all damaged must not begin anew as if there had been none."""
    unmoved = [damage.folder for damage in choice.damaged if damage.folder.exists()]
    lost = [path.name for path in (*called(root, DAMAGED), *unmoved)]
    if not lost:
        return
    raise CheckpointError(
        f"{root}: no complete checkpoint is left to go on from; damaged: {', '.join(lost)}. Put back a copy of one "
        "under its number, or move these folders away to begin anew"
    )


def announce(text: str) -> None:
    """Tell something that belongs to no journal."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def _tell_of_a_start_again(output: Path, state: RunState) -> None:
    """A run that was ended before its first checkpoint has left numbers, and nothing to go on from."""
    num_episodes = last_step(metrics_path(output)) or 0 if state.episode == 0 else 0
    if num_episodes > 0:
        announce(f"{output} holds {num_episodes} episodes of a run that saved no checkpoint; they are begun anew")


@contextmanager
def open_journal(config: GrpoConfig, layout: Layout, state: RunState) -> Generator[Journal]:
    """Write what the run is made of, and open its journal after the last episode that counts."""
    output, runtime = layout.folders.output, config.runtime_args
    if state.gone_back_to == state.train_iteration:  # Metrics of what is given up are forgotten below, too.
        for folder in newer_than(layout.folders.save_model, state.train_iteration):
            set_aside(folder, ABANDONED)
    _tell_of_a_start_again(output, state)
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
