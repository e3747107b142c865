"""Reads the rows of a data file. Whatever is wrong with the file becomes one message that names file and row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from chatlearn.errors import DataError

Row = Mapping[str, object]

MAX_PROBLEMS = 5  # enough to see the pattern; a file of the wrong kind has one problem in every row


def read_rows(path: Path) -> list[Row]:
    """All rows of a ``.json``, ``.jsonl`` or ``.parquet`` file, in the order of the file.

    JSON may be one object a line, one array of objects, or a single object.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: files of this kind cannot be read; give {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; check the path")
    try:
        rows = reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{path} is empty; give a file with at least one row")
    return rows


def place(path: Path, index: int) -> str:
    """How a message names a row; people count from one."""
    return f"{path} row {index + 1}"


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one error with the first few problems and the number of the others; no problems, no error."""
    if not problems:
        return
    rest = len(problems) - MAX_PROBLEMS
    raise DataError(*problems[:MAX_PROBLEMS], *([f"... and {rest} more rows like these"] if rest > 0 else []))


def content_hash(paths: Sequence[Path]) -> str:
    """The SHA-256 of the files' contents in order: equal as long as nobody changed the data."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_json(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    start = text.lstrip()[:1]
    if start == "[":
        return _read_document(path, text)
    try:
        return _read_lines(path, text)
    except DataError:
        # One object over several lines is a file of one row; if it is not that either, the line's error says more.
        if start == "{" and _is_document(text):
            return _read_document(path, text)
        raise


def _read_lines(path: Path, text: str) -> list[Row]:
    # Not splitlines: JSON strings may hold U+2028 and its kind unescaped.
    lines = [line for line in text.split("\n") if line.strip()]
    rows: list[Row] = []
    problems: list[str] = []
    for index, line in enumerate(lines):
        try:
            rows.append(_as_row(path, index, json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append(f"{place(path, index)}: not valid JSON: {error.msg} at column {error.colno}")
        except DataError as error:
            problems.append(str(error))
    raise_problems(problems)
    return rows


def _read_document(path: Path, text: str) -> list[Row]:
    try:
        document: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    values = cast("list[object]", document) if isinstance(document, list) else [document]
    return [_as_row(path, index, value) for index, value in enumerate(values)]


def _is_document(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _as_row(path: Path, index: int, value: object) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place(path, index)}: a JSON object was expected, found {type(value).__name__}")
    return cast("Row", value)  # the keys of a JSON object are strings


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    return cast("list[Row]", table.to_pylist())  # pyarrow has no types; rows are dicts by column name


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
