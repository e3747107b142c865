"""Configuration as text: the YAML file, overrides on the command line, and the resolved file a run leaves behind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from chatlearn.config.schema import GrpoConfig
from chatlearn.config.tree import flatten, nest
from chatlearn.errors import ConfigError

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def file_leaves(file: Path) -> dict[str, object]:
    """Keys and values of a YAML file, with ``${...}`` as written; a file that is no YAML mapping is a ConfigError."""
    try:
        loaded = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not text"
        raise ConfigError(f"the configuration file {file} cannot be read: {reason}") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"the configuration file {file} is not YAML: {_one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"the configuration file {file} must hold sections with keys, and holds a list")
    return _leaves(loaded)


def resolved_leaves(text: str) -> dict[str, object]:
    """Keys and values of a configuration that ``resolved_text`` wrote, with its ``${...}`` replaced."""
    loaded = OmegaConf.create(text)
    # What was written is a mapping of sections; OmegaConf's signature cannot say so.
    return flatten(cast("Mapping[object, object]", OmegaConf.to_container(loaded, resolve=True)))


def override_leaves(overrides: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Keys and values of ``key=value`` words, later ones first in rank, and the problems of words that are none."""
    leaves: dict[str, object] = {}
    problems: list[str] = []
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not (key and equals):
            problems.append(f"'{word}' is not an override; write key=value, for example runtime_args.num_episode=10")
            continue
        try:
            leaves.update(_leaves(OmegaConf.from_dotlist([word])))
        except (YAMLError, OmegaConfBaseException) as error:
            problems.append(f"the value of {word} is not YAML: {_one_line(error)}")
    return leaves, problems


def _leaves(loaded: DictConfig) -> dict[str, object]:
    # A DictConfig becomes a dict; OmegaConf's signature cannot say so.
    return flatten(cast("Mapping[object, object]", OmegaConf.to_container(loaded, resolve=False)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def resolved_text(config: GrpoConfig) -> str:
    """The whole configuration as YAML that can be given to ``--config-file`` again.

    An interpolation such as ``${runtime_args.output_dir}`` is kept where it still says the same, so that a copy can be
    moved to another folder with one override.
    """
    values = flatten(cast("Mapping[object, object]", config.model_dump(mode="json")))
    candidates = {
        key: text
        for key, text in config.origin.interpolations.items()
        if key in values and all(reference in values for reference in _REFERENCE.findall(text))
    }
    kept = {key: text for key, text in candidates.items() if _says(values | candidates, key) == values[key]}
    return OmegaConf.to_yaml(OmegaConf.create(nest(values | kept)))


def _says(leaves: Mapping[str, object], key: str) -> object:
    try:
        return OmegaConf.select(OmegaConf.create(nest(leaves)), key)
    except OmegaConfBaseException:  # a circle of references
        return None
