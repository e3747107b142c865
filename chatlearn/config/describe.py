"""Writes docs/config.md from the schema and the table of fates, and tells when the page has fallen behind.

``python -m chatlearn.config.describe --check docs/config.md`` exits 1 on a difference; ``--write`` mends it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from difflib import unified_diff
from pathlib import Path
from types import NoneType, UnionType
from typing import Final, Literal, Union, get_args, get_origin

from chatlearn.config.fate import Fate
from chatlearn.config.fates import FATES
from chatlearn.config.sections import SCHEMA_KEYS, SchemaKey

_INTRODUCTION: Final = """# Configuration

Generated from the schema and the table of fates by `python -m chatlearn.config.describe --write docs/config.md`.

A configuration is a YAML file with these keys; `key=value` on the command line overrides it, `${section.key}` refers to
another key. Every key that the FSDP path of the original ChatLearn knows has one fate:

- **honoured**: it does what is said here. Single values may be refused.
- **alias**: it speaks of the same fact as another key; two that disagree within the file, or within the command line,
  are an error. The command line outranks the file.
- **inert**: accepted at any value, because it has no meaning here. A run names such keys once at its start.
- **refused**: it asks for what this version cannot do, and is accepted only at the values that ask for nothing.

A key that is not listed is an error.
"""

_TITLES: Final = {
    "runtime_args": "The run: data, length, batches, evaluation, saving",
    "runtime_args.log_args_dict": "Trackers besides `metrics.jsonl` and the console",
    "models.policy": "The engines that answer prompts",
    "models.policy_trainer": "The policy trainer: FSDP2 over `num_gpu` ranks",
    "models.ref_policy": "The frozen reference model; what is absent is as for the policy trainer",
    "models.reward": "The graders",
    "models.partial_rollout_manager": "Partial rollout",
    "models.rollout_manager": "The rollout manager",
    "env_args": "The processes' environment",
}


def document() -> str:
    """The whole page."""
    sections = (_section(name, title) for name, title in _TITLES.items())
    return "\n".join([_INTRODUCTION, *sections])


def _section_of(key: str) -> str:
    return max((name for name in _TITLES if key.startswith(f"{name}.")), key=len)


def _section(name: str, title: str) -> str:
    rows = [row for row in FATES if _section_of(row.key) == name]
    lines = [_line(row, row.key.removeprefix(f"{name}.")) for row in rows]
    return "\n".join(
        [
            f"## `{name}`",
            "",
            f"{title}.",
            "",
            "| key | type | default | meaning | fate |",
            "| --- | --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )


def _line(row: Fate, name: str) -> str:
    item = SCHEMA_KEYS.get(row.key)
    meaning = (item.field.description or "") if item else ""
    cells = (f"`{name}`", _type(item), _default(row, item), " ".join(meaning.split()), _fate(row))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(item: SchemaKey | None) -> str:
    return _type_name(item.field.annotation) if item else ""


def _type_name(annotation: object) -> str:
    words = {int: "whole number", float: "number", bool: "True or False", str: "text", NoneType: "nothing"}
    if isinstance(annotation, type) and annotation in words:
        return words[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        return "list"
    return _type_name(arguments[0])  # Annotated[type, constraint]


def _default(row: Fate, item: SchemaKey | None) -> str:
    if item is None:
        return _value(row.allowed[0]) if row.allowed else ""
    return "**required**" if item.is_required else _value(item.default)


def _value(value: object) -> str:
    if value is None:
        return ""
    return "`[]`" if value == () else f"`{value}`"


def _fate(row: Fate) -> str:
    if row.kind == "honoured":
        return "; ".join(["honoured", *(f"`{value}` is refused: {why}" for value, why in row.unsupported.items())])
    return f"{row.kind}: {row.reason}"


def main(arguments: Sequence[str]) -> int:
    """Check or write the page; returns the exit status."""
    parser = ArgumentParser(prog="python -m chatlearn.config.describe", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", type=Path, metavar="FILE", help="exit 1 when FILE differs from the code")
    action.add_argument("--write", type=Path, metavar="FILE", help="write FILE")
    asked = parser.parse_args(arguments)
    page = document()
    if asked.write is not None:
        asked.write.write_text(page, encoding="utf-8")
        return 0
    present = asked.check.read_text(encoding="utf-8") if asked.check.is_file() else ""
    difference = unified_diff(present.splitlines(), page.splitlines(), str(asked.check), "the code", n=0, lineterm="")
    sys.stderr.writelines(f"{line}\n" for line in difference)
    return 0 if present == page else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
