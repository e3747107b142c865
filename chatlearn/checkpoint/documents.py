"""Small JSON files read without trust: what is missing or of the wrong type is named together with its file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar, cast

from chatlearn.checkpoint.durable import ABSENT, refusals_named
from chatlearn.errors import CheckpointError

Document = Mapping[str, object]
Item = TypeVar("Item")

CHECKSUM: Final = "checksum"  # the key of a document's own checksum


def read_document(path: Path) -> Document:
    """The JSON object in ``path``; raises ``CheckpointError`` where there is none, as ``UnreadableError`` for now."""
    try:
        with refusals_named(path):
            value: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; the folder is incomplete") from None
    except (*ABSENT, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__} instead of a JSON object; the file is damaged")
    return cast("Document", value)  # JSON's keys are always text


def integer(document: Document, key: str, path: Path) -> int:
    """A number that counts something, so never negative."""
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{path}: '{key}' is {value!r}; expected a whole number from 0")
    return value


def integers(document: Document, key: str, path: Path) -> tuple[int, ...]:
    """A list of such numbers."""
    return _each(integer, "whole numbers", document, key, path)


def text(document: Document, key: str, path: Path) -> str:
    """A string, possibly empty."""
    value = document.get(key)
    if not isinstance(value, str):
        raise CheckpointError(f"{path}: '{key}' is {value!r}; expected text")
    return value


def texts(document: Document, key: str, path: Path) -> tuple[str, ...]:
    """A list of strings."""
    return _each(text, "texts", document, key, path)


def _each(
    read: Callable[[Document, str, Path], Item], kind: str, document: Document, key: str, path: Path
) -> tuple[Item, ...]:
    values = document.get(key)
    if not isinstance(values, list):
        raise CheckpointError(f"{path}: '{key}' is {values!r}; expected a list of {kind}")
    return tuple(read({key: value}, key, path) for value in cast("list[object]", values))


def number(document: Document, key: str, path: Path) -> float:
    """A number that measures something."""
    value = document.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{path}: '{key}' is {value!r}; expected a number")
    return float(value)


def flag(document: Document, key: str, path: Path) -> bool:
    """True or false."""
    value = document.get(key)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: '{key}' is {value!r}; expected true or false")
    return value


def inner(document: Document, key: str, path: Path) -> Document:
    """A JSON object inside another."""
    value = document.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: '{key}' is {value!r}; expected an object")
    return cast("Document", value)  # JSON's keys are always text


def objects(document: Document, key: str, path: Path) -> list[Document]:
    """A list of JSON objects."""
    value = document.get(key)
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: '{key}' is {type(value).__name__}; expected a list")
    items = cast("list[object]", value)
    for item in items:
        if not isinstance(item, dict):
            raise CheckpointError(f"{path}: '{key}' holds {item!r}; expected JSON objects")
    return cast("list[Document]", items)  # checked one by one above


def require_schema(document: Document, known: int, path: Path, oldest: int | None = None) -> None:
    """Refuse a file that another version of ChatLearn wrote in a form that this one does not know.

    Versions from ``oldest`` (absent: ``known``) to ``known`` are read.
    """
    schema = integer(document, "schema_version", path)
    if not (known if oldest is None else oldest) <= schema <= known:
        raise CheckpointError(f"{path}: schema_version is {schema}; this ChatLearn reads version {known}")


def checksum_of(document: Document) -> str:
    """CRC-32 of a JSON object's content, without its own ``checksum``; spaces and the order of keys do not count."""
    rest = {key: value for key, value in document.items() if key != CHECKSUM}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def require_checksum(document: Document, path: Path) -> None:
    """Refuse a document that is not what was written, though it may read well."""
    said, found = text(document, CHECKSUM, path), checksum_of(document)
    if said != found:
        raise CheckpointError(f"{path}: its content has checksum {found} instead of {said}; the file is damaged")
