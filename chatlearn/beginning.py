"""Where a run begins: the state it goes on from, the journal it goes on with, the weights that belong to it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from chatlearn.checkpoint.adapters import AdapterRecord, require_same_adapter
from chatlearn.checkpoint.durable import write_text
from chatlearn.checkpoint.layout import checkpoint_folder, latest_complete, recover
from chatlearn.checkpoint.manifest import read_manifest
from chatlearn.checkpoint.run_state import RunState, load_run_state
from chatlearn.config.layout import Layout
from chatlearn.config.schema import GrpoConfig
from chatlearn.config.text import resolved_text
from chatlearn.errors import ConfigError
from chatlearn.observability.journal import Journal
from chatlearn.observability.manifest import RunFacts, write_manifest
from chatlearn.recipe import lora_spec
from chatlearn.specs import journal_spec
from chatlearn.team import Team

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
