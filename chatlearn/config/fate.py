"""What becomes of a configuration key: it is honoured, an alias, inert, or refused. Every key has exactly one fate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["honoured", "alias", "inert", "refused"]


@dataclass(frozen=True)
class Fate:
    """One row of the table of fates.

    ``reason`` tells why a key is inert or refused. An alias speaks of the same fact as the key ``of``; ``meanings``
    translates its values where they differ (None: says nothing). A refused key accepts only the
    values in ``allowed``, because they ask for nothing; the first is what an absent key means. ``unsupported`` names
    single values of an honoured key that are refused, with the reason.
    """

    key: str
    kind: Kind
    reason: str = ""
    of: str = ""
    meanings: Mapping[object, object] = field(default_factory=dict[object, object])
    allowed: tuple[object, ...] = ()
    unsupported: Mapping[object, str] = field(default_factory=dict[object, str])


def honoured(section: str, *names: str) -> tuple[Fate, ...]:
    """Keys that do what their description in the schema says."""
    return tuple(Fate(f"{section}.{name}", "honoured") for name in names)


def honoured_except(key: str, unsupported: Mapping[object, str]) -> Fate:
    """A key that is honoured, but for some values that the original knows and this version does not."""
    return Fate(key, "honoured", unsupported=unsupported)


def alias(key: str, of: str) -> Fate:
    """Another spelling of the key ``of``; two spellings that disagree are an error."""
    return Fate(key, "alias", reason=f"the same fact as `{of}`", of=of)


def inert(section: str, reason: str, *names: str) -> tuple[Fate, ...]:
    """Keys that are accepted at any value because they have no meaning here; a run names them once at its start."""
    return tuple(Fate(f"{section}.{name}", "inert", reason=reason) for name in names)


def refused(key: str, allowed: tuple[object, ...], reason: str) -> Fate:
    """A key that asks for what this version cannot do; the ``allowed`` values ask for nothing and are accepted."""
    return Fate(key, "refused", reason=reason, allowed=allowed)
