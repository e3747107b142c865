"""Causes in the weights that the engine computes with: old ones, or some that are missing or damaged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice, product

from chatlearn.numerics.bench import Bench
from chatlearn.numerics.change import NO_CHANGE, Change, OtherWeights, Source
from chatlearn.numerics.gap import gap_between
from chatlearn.numerics.verdict import Trial

# Passes over a few dozen answers; more would let a person wait who is waiting for an error.
MAX_TRIALS = 400
LAYER = re.compile(r"\.layers\.(\d+)\.")

STALE = "stale weights"
DAMAGED = "missing or corrupted tensors"
CHECK_TRANSFER = (
    "look into logs/policy_*.log for the weight transfer, and report this with the versions in manifest.json"
)


def told_versions(bench: Bench) -> Iterator[Trial]:
    """The engine itself says that it sampled from other weights."""
    if bench.facts.other_versions:
        yield Trial(
            STALE, "", bench.facts.other_versions,
            "an engine must count a version only when all of its update has arrived, and every replica must get it",
            bench.gap, proven=True,
        )  # fmt: skip


def first_weights(bench: Bench) -> Iterator[Trial]:
    """The engine still has the weights of the model directory."""
    if bench.facts.has_moved:
        yield Trial(
            STALE,
            "the trainer with the weights of the model directory",
            "the engine still has the weights of the model directory, and none that were sent to it",
            CHECK_TRANSFER,
            bench.gap_with(Change(weights=OtherWeights("stored"))),
        )


def sent_again(bench: Bench) -> Iterator[Trial]:
    """The engine had other weights than the trainer until they were sent again."""
    answers = bench.again()
    yield Trial(
        STALE,
        "weights sent again, and prompts answered again",
        "since the weights were sent again the engine agrees with the trainer: what it had before were others",
        "begin again: the answers of this episode are from other weights. If it happens at every start, "
        + CHECK_TRANSFER,
        gap_between(answers, bench.score(answers, NO_CHANGE)),
    )


def single_tensors(bench: Bench) -> Iterator[Trial]:
    """Some of the engine's tensors are those of the model directory, or zeros.

    Groups first: a layer, or the tensors of one kind in all layers; then one by one.
    """
    sources: tuple[Source, ...] = ("stored", "zero") if bench.facts.has_moved else ("zero",)
    attempts = product(groups_of(bench.facts.parameters), sources)
    for (label, names), source in islice(attempts, MAX_TRIALS):
        instead = "zeros" if source == "zero" else "the model directory's values"
        yield Trial(
            DAMAGED,
            f"the trainer with {instead} in {label}",
            f"the engine has {instead} in {label}, and sending the weights again did not mend it",
            CHECK_TRANSFER,
            bench.gap_with(Change(weights=OtherWeights(source, frozenset(names)))),
        )


def groups_of(parameters: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """What may be missing together, with a name for it.

    >>> groups_of(("a.layers.0.x", "a.layers.1.x", "n"))
    [('layer 0', ('a.layers.0.x',)), ('layer 1', ('a.layers.1.x',)), ('x of all layers', \
('a.layers.0.x', 'a.layers.1.x')), ('a.layers.0.x', ('a.layers.0.x',)), ('a.layers.1.x', ('a.layers.1.x',)), \
('n', ('n',))]
    """
    groups: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    for name in parameters:
        place = LAYER.search(name)
        if place is not None:
            groups.setdefault(f"layer {place[1]}", []).append(name)
            kinds.setdefault(f"{name[place.end() :]} of all layers", []).append(name)
    return [
        *((label, tuple(names)) for label, names in (groups | kinds).items()),
        *((name, (name,)) for name in parameters),
    ]
