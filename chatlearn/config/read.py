"""From a YAML file and overrides to a configuration; everything that is wrong is reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from chatlearn.config.aliases import disagreements, settle, translate
from chatlearn.config.checks import cross_problems
from chatlearn.config.complaints import refusals, show, unknown_key, validation_problems
from chatlearn.config.fates import FATE_OF, FATES
from chatlearn.config.schema import GrpoConfig, Origin
from chatlearn.config.sections import SCHEMA_KEYS, SCHEMA_SECTIONS, SECTIONS, default_leaves
from chatlearn.config.text import file_leaves, override_leaves
from chatlearn.config.tree import nest
from chatlearn.errors import ConfigError


def read_config(file: Path, overrides: Sequence[str] = ()) -> GrpoConfig:
    """Read ``file``, apply ``key=value`` overrides, resolve ``${...}``, check; one ConfigError lists all problems."""
    from_overrides, problems = override_leaves(overrides)
    return config_of(file_leaves(file), from_overrides, problems)


def config_of(
    from_file: Mapping[str, object], from_overrides: Mapping[str, object], problems: Sequence[str] = ()
) -> GrpoConfig:
    """Build a configuration from dotted keys; ``problems`` that were found before are reported with the rest."""
    found = list(problems)
    file_keys = _known(from_file, found, nothing=(None, {}))
    override_keys = _known(from_overrides, found, nothing=({},))
    settled = settle(file_keys, override_keys)
    tree = OmegaConf.create(nest({**default_leaves(), **settled.leaves}))
    written = file_keys | override_keys
    values = _resolved(tree, [*written, *settled.speakers], found)
    found += disagreements(values, settled.speakers)
    added, puzzles = translate(values, override_keys)
    values |= added
    found += [*puzzles, *refusals(values)]
    asked = {key: value for key, value in values.items() if key in SCHEMA_KEYS}
    spelt = {key: spellings[0] for key, spellings in settled.speakers.items()}
    config, faults = _validated(asked, spelt)
    found += [problem for problem in faults if problem not in found]
    if found or config is None:
        raise ConfigError(*found)
    return config.written_as(_origin(written, settled.leaves))


def _known(leaves: Mapping[str, object], problems: list[str], nothing: Sequence[object]) -> dict[str, object]:
    """The keys somebody knows; the others become problems. A section that is one of ``nothing`` is merely empty.

    ``models.ref_policy:`` in a file is an empty section; ``models.ref_policy=null`` as an override wants something.
    """
    known: dict[str, object] = {}
    for key, value in leaves.items():
        if key in FATE_OF:
            known[key] = value
        elif key not in SECTIONS:
            problems.append(unknown_key(key))
        elif value not in nothing:
            problems.append(f"{key}={show(value)} must be a section with keys of its own; docs/config.md lists them")
    return known


def _resolved(tree: DictConfig, keys: Sequence[str], problems: list[str]) -> dict[str, object]:
    """Values after interpolation, by key; a reference to nothing is a problem."""
    values: dict[str, object] = {}
    for key in dict.fromkeys(keys):
        try:
            value = OmegaConf.select(tree, key)
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            problems.append(f"{key} refers to something that cannot be found: {reason}")
    return values


@dataclass(frozen=True)
class _Attempt:
    config: GrpoConfig | None
    problems: list[str]
    bad_keys: frozenset[str]


def _validated(asked: Mapping[str, object], spelt: Mapping[str, str]) -> tuple[GrpoConfig | None, list[str]]:
    """Check types and ranges, then the laws between keys.

    Where single keys are wrong, the laws are tried with those keys at their defaults, so that one run shows as much as
    it can; what such a law says about a wrong key itself is left out.
    """
    first = _attempt(asked, spelt)
    if first.config is not None:
        return first.config, cross_problems(first.config)
    second = _attempt({key: value for key, value in asked.items() if key not in first.bad_keys}, spelt)
    if second.config is None:
        return None, first.problems
    names = [key.rpartition(".")[2] for key in first.bad_keys]
    laws = [law for law in cross_problems(second.config) if not any(name in law for name in names)]
    return None, first.problems + laws


def _attempt(asked: Mapping[str, object], spelt: Mapping[str, str]) -> _Attempt:
    try:
        return _Attempt(GrpoConfig.model_validate(nest(asked, SCHEMA_SECTIONS)), [], frozenset())
    except ValidationError as error:
        problems = validation_problems(error, spelt)
        return _Attempt(None, list(problems.values()), frozenset(problems))


def _origin(written: Mapping[str, object], leaves: Mapping[str, object]) -> Origin:
    interpolations = {
        key: text for key in written if key in SCHEMA_KEYS and isinstance(text := leaves.get(key), str) and "${" in text
    }
    inert = [row.key for row in FATES if row.kind == "inert" and row.key in written]
    return Origin(interpolations, tuple(inert))
