"""How problems are said: the key, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from chatlearn.config.fate import Fate
from chatlearn.config.fates import FATE_OF

FEW_KEYS: Final = 4  # as many as a message has room for


def unknown_key(key: str) -> str:
    """Name the nearest key that exists: the same last word in another section, else the closest spelling.

    A long section makes all of its keys look alike, so the last words must be alike too. Where nothing is, the keys of
    a small section are told.
    """
    section, _, name = key.rpartition(".")
    same_name = [known for known in FATE_OF if known.rpartition(".")[2] == name]
    close = get_close_matches(key, same_name or list(FATE_OF), n=5, cutoff=0.0 if same_name else 0.6)
    alike = [known for known in close if get_close_matches(name, [known.rpartition(".")[2]], cutoff=0.5)]
    if alike:
        return f"unknown key {key}; did you mean {alike[0]}?"
    names = sorted(known.rpartition(".")[2] for known in FATE_OF if known.rpartition(".")[0] == section)
    if 0 < len(names) <= FEW_KEYS:
        return f"unknown key {key}; the keys of {section} are {', '.join(names)}"
    return f"unknown key {key}; docs/config.md lists all keys"


def refusals(values: Mapping[str, object]) -> list[str]:
    """One problem for every key that asks for what this version cannot do."""
    problems: list[str] = []
    for key, value in values.items():
        row = FATE_OF.get(key)
        if row is None:
            continue
        plain = tuple(value) if isinstance(value, list) else value
        if row.kind == "refused" and plain not in row.allowed:
            problems.append(f"{key}={show(value)} is refused: {row.reason}; {_cure(row)}")
        elif isinstance(value, str) and value in row.unsupported:
            problems.append(f"{key}={show(value)} is refused: {row.unsupported[value]}")
    return problems


def _cure(row: Fate) -> str:
    harmless = row.allowed[0]
    return "remove it" if harmless is None or harmless == () else f"remove it or use {show(harmless)}"


_SAYINGS: Final[Mapping[str, Callable[[Mapping[str, object]], str]]] = {
    "int_type": lambda _: "a whole number",
    "int_from_float": lambda _: "a whole number",
    "float_type": lambda _: "a number",
    "finite_number": lambda _: "a finite number",
    "bool_type": lambda _: "True or False",
    "string_type": lambda _: "text",
    "tuple_type": lambda _: "a list",
    "literal_error": lambda context: str(context["expected"]),
    "greater_than": lambda context: f"above {context['gt']}",
    "greater_than_equal": lambda context: f"at least {context['ge']}",
    "less_than": lambda context: f"below {context['lt']}",
    "less_than_equal": lambda context: f"at most {context['le']}",
}


def validation_problems(error: ValidationError, spelt: Mapping[str, str]) -> dict[str, str]:
    """One sentence for every key of the schema that has a wrong type or value, under the spelling that was written."""
    problems: dict[str, str] = {}
    for detail in error.errors():
        key = ".".join(part for part in detail["loc"] if isinstance(part, str))
        problems.setdefault(key, _sentence(spelt.get(key, key), detail))
    return problems


def _sentence(key: str, detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return f"{key} is missing; set it in the configuration file or as {key}=value"
    saying = _SAYINGS.get(detail["type"])
    wanted = saying(detail.get("ctx", {})) if saying else detail["msg"]
    value = detail["input"]
    return f"{key}={show(value)} must be {wanted}{_kind(value, detail['type'])}"


def _kind(value: object, fault: str) -> str:
    """What was found, where the type is what is wrong."""
    if not (fault.endswith("_type") or fault == "int_from_float"):
        return ""
    # True is an int in Python and no number in YAML, so it is asked first.
    kinds = ((bool, "True or False"), (int, "a whole number"), (float, "a number"), (str, "text"), (list, "a list"))
    return f", not {next((words for kind, words in kinds if isinstance(value, kind)), 'empty')}"


def show(value: object) -> str:
    """A value as it would be written in YAML."""
    return "null" if value is None else str(value)
