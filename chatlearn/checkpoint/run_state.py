"""How far a run has come: the counters and the position in the data that a resume starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from chatlearn.checkpoint.documents import (
    Document,
    inner,
    integer,
    integers,
    number,
    read_document,
    require_schema,
    text,
)
from chatlearn.checkpoint.durable import failures_named, write_text
from chatlearn.checkpoint.open_groups import load_open_groups, save_open_groups
from chatlearn.records import OpenGroup

RUN_STATE_NAME = "run_state.json"
CONFIG_NAME = "config.yaml"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunState:
    """Where the next episode begins; all counters are of finished work.

    ``episode`` and ``train_iteration`` (optimizer steps) count from 0 before training; ``policy_version`` is that of
    the weights saved with it; ``epoch``, ``offset`` and ``deferred`` are the position in the prompt stream;
    ``metrics_bytes`` is the length that ``metrics.jsonl`` had, a fact for tools; a resume cuts that file by step.
    ``evaluation`` holds the numbers that the weights were evaluated with, if they were.
    ``gone_back_to`` is the train iteration that somebody sent the run back to; all later checkpoints carry it.
    ``open_groups`` are the prompts that ``schedule``, by its name, is in the middle of, the oldest first.
    """

    episode: int
    train_iteration: int
    policy_version: int
    epoch: int
    offset: int
    metrics_bytes: int
    deferred: tuple[int, ...] = ()
    gone_back_to: int | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict[str, float])
    schedule: str = ""
    open_groups: tuple[OpenGroup, ...] = ()


def save_run_state(directory: Path, state: RunState) -> None:
    """Write ``state`` into ``directory``, a staged checkpoint: what resume reads."""
    save_counters(directory, state)
    save_open_groups(directory, state.open_groups)


def save_counters(directory: Path, state: RunState) -> None:
    """Write ``run_state.json`` alone, replacing an earlier one whole: in ``data_checkpoint_path`` for people."""
    counters = {key: value for key, value in asdict(replace(state, open_groups=())).items() if key != "open_groups"}
    document = {"schema_version": SCHEMA_VERSION, **counters, "num_open_groups": len(state.open_groups)}
    with failures_named(directory):
        write_text(directory / RUN_STATE_NAME, json.dumps(document, indent=1) + "\n")


def save_config(directory: Path, text: str) -> None:
    """Write the run's configuration into a staged checkpoint: a resume compares its own with it, key by key."""
    with failures_named(directory):
        write_text(directory / CONFIG_NAME, text)


def load_config(directory: Path) -> str | None:
    """The configuration in a checkpoint; ``None`` in those of versions that did not keep it."""
    path = directory / CONFIG_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def load_run_state(directory: Path) -> RunState:
    """Read it back; raises ``CheckpointError`` where it is missing, damaged or of another schema version."""
    path = directory / RUN_STATE_NAME
    document = read_document(path)
    require_schema(document, SCHEMA_VERSION, path)
    return RunState(
        episode=integer(document, "episode", path),
        train_iteration=integer(document, "train_iteration", path),
        policy_version=integer(document, "policy_version", path),
        epoch=integer(document, "epoch", path),
        offset=integer(document, "offset", path),
        metrics_bytes=integer(document, "metrics_bytes", path),
        deferred=integers(document, "deferred", path),
        gone_back_to=None if document.get("gone_back_to") is None else integer(document, "gone_back_to", path),
        evaluation=_evaluation(document, path),
        schedule=text(document, "schedule", path) if "schedule" in document else "",  # older ones left nothing open
        open_groups=load_open_groups(directory),
    )


def _evaluation(document: Document, path: Path) -> dict[str, float]:
    if document.get("evaluation") is None:
        return {}
    numbers = inner(document, "evaluation", path)
    return {name: number(numbers, name, path) for name in numbers}
