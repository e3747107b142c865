"""Before training: does the grader recognise the gold answers themselves? Where it does not, no policy can be right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np

from chatlearn.observability.whole_file import replacing
from chatlearn.records import Prompt

NUM_SAMPLES = 500
MAX_EXAMPLES = 5

# Part of what is remembered; a change of the mathematics reward that could change verdicts takes the next number.
GRADER_VERSION = 1


@dataclass(frozen=True)
class GoldCheck:
    """How many gold answers were tried, how many are not recognised, and a few of those, a line each."""

    num_tried: int
    num_ungradable: int
    examples: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line for the operator."""
        return f"{self.num_ungradable} of {self.num_tried} gold answers cannot be graded"


def gold_check(
    prompts: Sequence[Prompt],
    grade_gold: Callable[[Sequence[Prompt]], Sequence[str]],
    ledger: Path,
    data_hash: str,
    seed: int,
    num_samples: int = NUM_SAMPLES,
) -> GoldCheck:
    """Try at most ``num_samples`` gold answers, drawn by ``seed``, unless the ledger knows the result for this data.

    ``prompts`` are those that ``grade.gold_prompts`` leaves. ``grade_gold`` is ``Grader.grade_gold`` or its like: it
    returns a line for each answer that is not recognised. The ledger is a JSON file of results by data, sample and
    version of the grader.
    """
    key = f"{data_hash}:{len(prompts)}:{seed}:{num_samples}:{GRADER_VERSION}"
    known = _read_ledger(ledger)
    if key in known:
        return known[key]
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen = generator.permutation(len(prompts))[:num_samples]
    faults = grade_gold([prompts[index] for index in sorted(chosen.tolist())])
    result = GoldCheck(len(chosen), len(faults), tuple(faults[:MAX_EXAMPLES]))
    _write_ledger(ledger, {**known, key: result})
    return result


def _read_ledger(path: Path) -> dict[str, GoldCheck]:
    if not path.is_file():
        return {}
    try:
        entries = cast("dict[str, dict[str, object]]", json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError:
        return {}  # a cache that cannot be read costs a new check, nothing else
    return {key: _to_check(entry) for key, entry in entries.items()}


def _to_check(entry: Mapping[str, object]) -> GoldCheck:
    fields = cast("Mapping[str, int]", entry)
    examples = cast("Sequence[str]", entry["examples"])
    return GoldCheck(fields["num_tried"], fields["num_ungradable"], tuple(examples))


def _write_ledger(path: Path, entries: Mapping[str, GoldCheck]) -> None:
    with replacing(path) as file:
        json.dump({key: asdict(entry) for key, entry in entries.items()}, file, indent=1)
