"""Several spellings of one fact: the one that was written speaks for all; two that disagree are an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from chatlearn.config.fates import FATES

_PLAIN: Final = [row for row in FATES if row.kind == "alias" and not row.meanings]
SPELLINGS: Final[dict[str, tuple[str, ...]]] = {
    key: (key, *(row.key for row in _PLAIN if row.of == key)) for key in dict.fromkeys(row.of for row in _PLAIN)
}
TRANSLATED: Final = tuple(row for row in FATES if row.kind == "alias" and row.meanings)


@dataclass(frozen=True)
class Settled:
    """Leaves in which every spelling of a fact refers to the one that speaks.

    ``speakers`` lists, for each fact that somebody spoke of, the spellings that state a value; the first decides.
    """

    leaves: Mapping[str, object]
    speakers: Mapping[str, Sequence[str]]


def settle(from_file: Mapping[str, object], from_overrides: Mapping[str, object]) -> Settled:
    """Let an override, in any spelling, speak louder than the file; within one of them all spellings must agree."""
    leaves = {**from_file, **from_overrides}
    speakers: dict[str, Sequence[str]] = {}
    for key, spellings in SPELLINGS.items():
        heard = _heard(from_overrides, key, spellings) or _heard(from_file, key, spellings)
        if heard:
            speakers[key] = heard
        else:
            leaves.pop(key, None)  # it could only refer to another spelling, which says nothing
        voice = heard[0] if heard else key
        leaves.update({spelling: f"${{{voice}}}" for spelling in spellings if spelling not in {voice, *heard}})
    return Settled(leaves, speakers)


def _heard(layer: Mapping[str, object], key: str, spellings: Sequence[str]) -> list[str]:
    """The spellings that state a value themselves; an alias that is empty, or refers to another spelling, does not."""
    references = {f"${{{spelling}}}" for spelling in spellings}
    return [
        spelling
        for spelling in spellings
        if spelling in layer
        and (spelling == key or layer[spelling] is not None)
        and str(layer[spelling]).replace(" ", "") not in references
    ]


def disagreements(values: Mapping[str, object], speakers: Mapping[str, Sequence[str]]) -> list[str]:
    """One problem for every fact whose spellings state different values."""
    problems: list[str] = []
    for spellings in speakers.values():
        stated = {spelling: values[spelling] for spelling in spellings if spelling in values}
        if any(value != next(iter(stated.values())) for value in stated.values()):
            said = " and ".join(f"{spelling}={value}" for spelling, value in stated.items())
            problems.append(f"{said} speak of the same fact and disagree; keep one of them")
    return problems


def translate(
    values: Mapping[str, object], from_overrides: Mapping[str, object]
) -> tuple[dict[str, object], list[str]]:
    """Add what switches of the original say in our words, such as ``use_group_sequence_policy=True``: ``loss=gspo``."""
    added: dict[str, object] = {}
    problems: list[str] = []
    for row in TRANSLATED:
        if row.key not in values:
            continue
        value = values[row.key]
        meanings = [meaning for word, meaning in row.meanings.items() if word is value]
        if not meanings:
            problems.append(f"{row.key}={value} must be {' or '.join(map(str, row.meanings))}")
            continue
        meaning, stated = meanings[0], values.get(row.of)
        louder = (row.key in from_overrides) - (row.of in from_overrides)
        if meaning is None or stated == meaning or (stated is not None and louder < 0):
            continue
        if stated is not None and louder == 0:
            problems.append(f"{row.key}={value} means {row.of}={meaning}, but {row.of}={stated} is set; keep one")
            continue
        added[row.of] = meaning
    return added, problems
