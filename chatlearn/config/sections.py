"""The schema and the table of fates as flat lists of keys, sections and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from chatlearn.config.fates import FATES
from chatlearn.config.schema import GrpoConfig


@dataclass(frozen=True)
class SchemaKey:
    """A key of the schema; ``is_required`` tells that it has no default."""

    key: str
    field: FieldInfo
    is_required: bool
    default: object


def _keys(section: type[BaseModel], prefix: str) -> Iterator[SchemaKey]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _keys(annotation, f"{key}.")
        else:
            is_required = field.default is PydanticUndefined
            yield SchemaKey(key, field, is_required, None if is_required else field.default)


def _parents(key: str) -> list[str]:
    names = key.split(".")
    return [".".join(names[:depth]) for depth in range(1, len(names))]


SCHEMA_KEYS: Final[dict[str, SchemaKey]] = {item.key: item for item in _keys(GrpoConfig, "")}
SCHEMA_SECTIONS: Final = tuple(dict.fromkeys(parent for key in SCHEMA_KEYS for parent in _parents(key)))
SECTIONS: Final = frozenset(parent for row in FATES for parent in _parents(row.key))


def default_leaves() -> dict[str, object]:
    """What absent keys mean, so that ``${...}`` may refer to them."""
    harmless = {row.key: row.allowed[0] for row in FATES if row.kind == "refused"}
    defaults = {item.key: item.default for item in SCHEMA_KEYS.values() if not item.is_required}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in (harmless | defaults).items()}
