"""Two runs compared to the bit, in the order in which a difference would have arisen.

Episode by episode: which prompts were asked, what was answered, what the metrics say, and, where both runs saved, the
run's state, the weights, the optimizer and the random states. Only what a run leaves on the disk is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from chatlearn.checkpoint.documents import read_document
from chatlearn.checkpoint.durable import checksum
from chatlearn.checkpoint.guarded_reader import load_plain
from chatlearn.checkpoint.layout import MODEL_FOLDER, OPTIMIZER_FOLDER, RANDOM_FOLDER, list_complete
from chatlearn.checkpoint.manifest import read_manifest
from chatlearn.checkpoint.open_groups import GROUPS_NAME, STREAMS_NAME
from chatlearn.checkpoint.run_state import RUN_STATE_NAME
from chatlearn.checkpoint.saved_tensors import open_shards
from chatlearn.config.layout import TRAINER_CHECKPOINTS
from chatlearn.observability.describe import is_measured
from chatlearn.observability.rollouts import rollouts_path
from chatlearn.observability.sinks import metrics_path
from chatlearn.resume_check.parting import parting, shown

Kind = Literal["data_order", "rollouts", "metrics", "checkpoints", "run_state", "weights", "optimizer", "random_states"]
# The length of a file in which the machine's seconds are written, too.
NOT_STATE: Final = ("metrics_bytes",)

Line: TypeAlias = Mapping[str, object]


@dataclass(frozen=True)
class Piece:
    """One thing that two runs must have alike, and what each of them has; ``None`` where one has nothing."""

    kind: Kind
    episode: int
    name: str
    uninterrupted: object
    resumed: object


@dataclass(frozen=True)
class Difference:
    """The first thing that is not the same: what it is, where in it, and what either run has there."""

    kind: Kind
    episode: int
    place: str
    uninterrupted: object
    resumed: object

    def __str__(self) -> str:
        what = self.kind.replace("_", " ")
        return (
            f"{what} of episode {self.episode}: {self.place} is {shown(self.uninterrupted)} in the uninterrupted run "
            f"and {shown(self.resumed)} in the resumed one"
        )


@dataclass(frozen=True)
class Comparison:
    """How many things of each kind were compared, up to the first that differs, if one does."""

    counts: Mapping[Kind, int]
    difference: Difference | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.difference is None

    def document(self) -> dict[str, object]:
        """As JSON says it."""
        found = self.difference
        told = {
            "kind": found.kind,
            "episode": found.episode,
            "place": found.place,
            "uninterrupted": shown(found.uninterrupted),
            "resumed": shown(found.resumed),
        } if found else None  # fmt: skip
        return {"equal": self.equal, "compared": dict(self.counts), "first_difference": told}


def compare_runs(uninterrupted: Path, resumed: Path) -> Comparison:
    """Compare what two runs left in their output directories.

    Two tensors are in memory at a time. Raises ``CheckpointError`` where a checkpoint cannot be read.
    """
    counts: Counter[Kind] = Counter()
    for piece in _pieces(uninterrupted, resumed):
        counts[piece.kind] += 1
        found = parting(piece.uninterrupted, piece.resumed)
        if found is not None:
            place = f"{piece.name}{found.place}"
            difference = Difference(piece.kind, piece.episode, place, found.first, found.second)
            return Comparison(_in_order(counts), difference)
    return Comparison(_in_order(counts), None)


def _in_order(counts: Mapping[Kind, int]) -> dict[Kind, int]:
    kinds: tuple[Kind, ...] = get_args(Kind)
    return {kind: counts[kind] for kind in kinds if kind in counts}


def _pieces(first: Path, second: Path) -> Iterator[Piece]:
    """Everything that must be the same, in the order in which it arises."""
    numbers, other_numbers = _numbers(first), _numbers(second)
    saved, other_saved = _checkpoints(first), _checkpoints(second)
    for episode in sorted({*numbers, *other_numbers, *saved, *other_saved}):
        yield from _answer_pieces(episode, _answers(first, episode), _answers(second, episode))
        yield from _metric_pieces(episode, numbers.get(episode, []), other_numbers.get(episode, []))
        folder, other_folder = saved.get(episode), other_saved.get(episode)
        if folder or other_folder:
            names = (path.name if path else None for path in (folder, other_folder))
            yield Piece("checkpoints", episode, "iteration", *names)
        if folder and other_folder:
            yield from _checkpoint_pieces(episode, folder, other_folder)


def _answers(run: Path, episode: int) -> list[Line]:
    """The lines of an episode's rollouts; none where it has none."""
    path = rollouts_path(run, episode)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _answer_pieces(episode: int, first: Sequence[Line], second: Sequence[Line]) -> Iterator[Piece]:
    pairs = list(enumerate(zip_longest(first, second), start=1))
    for number, (one, other) in pairs:
        uids = (line["prompt_uid"] if line else None for line in (one, other))
        yield Piece("data_order", episode, f"prompt_uid in line {number}", *uids)
    for number, (one, other) in pairs:
        yield Piece("rollouts", episode, f"line {number}", one, other)


def _numbers(run: Path) -> dict[int, list[Line]]:
    """The numbers that each step's lines hold, without those that measure the machine; nor lines of only those."""
    steps: dict[int, list[Line]] = {}
    for text in metrics_path(run).read_text(encoding="utf-8").splitlines():
        line: dict[str, object] = json.loads(text)
        step = int(str(line.pop("step")))
        lines, kept = steps.setdefault(step, []), {name: line[name] for name in line if not is_measured(name)}
        if kept.keys() - {"schema"}:
            lines.append(kept)
    return steps


def _metric_pieces(episode: int, first: Sequence[Line], second: Sequence[Line]) -> Iterator[Piece]:
    for one, other in zip_longest(first, second, fillvalue=dict[str, object]()):
        for name in dict.fromkeys([*one, *other]):
            yield Piece("metrics", episode, name, one.get(name), other.get(name))


def _checkpoints(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by the episode after which they were saved."""
    return {read_manifest(folder).episode: folder for folder in list_complete(run / TRAINER_CHECKPOINTS)}


def _checkpoint_pieces(episode: int, first: Path, second: Path) -> Iterator[Piece]:
    state, other_state = (read_document(folder / RUN_STATE_NAME) for folder in (first, second))
    for name in dict.fromkeys([*state, *other_state]):
        if name not in NOT_STATE:
            yield Piece("run_state", episode, name, state.get(name), other_state.get(name))
    for name in (GROUPS_NAME, STREAMS_NAME):  # What the schedule is in the middle of.
        paths = [folder / name for folder in (first, second)]
        if any(path.exists() for path in paths):
            yield Piece("run_state", episode, name, *(checksum(p) if p.exists() else None for p in paths))
    yield from _tensor_pieces("weights", episode, first / MODEL_FOLDER, second / MODEL_FOLDER)
    yield from _tensor_pieces("optimizer", episode, first / OPTIMIZER_FOLDER, second / OPTIMIZER_FOLDER)
    files = sorted({path.name for folder in (first, second) for path in (folder / RANDOM_FOLDER).iterdir()})
    for name in files:
        paths = [folder / RANDOM_FOLDER / name for folder in (first, second)]
        yield Piece("random_states", episode, name, *(load_plain(p, str(p)) if p.exists() else None for p in paths))


def _tensor_pieces(kind: Kind, episode: int, first: Path, second: Path) -> Iterator[Piece]:
    tensors, others = open_shards(first), open_shards(second)
    for name in dict.fromkeys([*tensors.shapes, *others.shapes]):
        yield Piece(
            kind,
            episode,
            name,
            *(saved.read_as_saved(name) if name in saved.shapes else None for saved in (tensors, others)),
        )
