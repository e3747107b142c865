"""What the preprocessors have in common as commands: their arguments, their course, and how they report errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from chatlearn.data.data_preprocess.records_file import Record, write_splits
from chatlearn.data.data_preprocess.source_files import SourceFile, read_sources
from chatlearn.data.rows import Row, place, raise_problems
from chatlearn.errors import ConfigError, DataError

# (row, split, index within the split) -> record; raises DataError where the row cannot be used.
Convert = Callable[[Row, str, int], Record]


@dataclass(frozen=True)
class Preprocessor:
    """A data set that can be prepared: the columns its raw rows must have, and how a row becomes a record."""

    description: str
    columns: Set[str]
    convert: Convert
    default_dir: str


def prepare(preprocessor: Preprocessor, arguments: Sequence[str]) -> None:
    """Read the raw files of both splits, convert every row, and write both files or none."""
    parser = argparse.ArgumentParser(description=preprocessor.description)
    parser.add_argument("--input_dir", type=Path, required=True, help="the downloaded data set")
    parser.add_argument("--local_dir", type=Path, default=preprocessor.default_dir, help="where the result goes")
    options = parser.parse_args(arguments)
    input_dir: Path = options.input_dir.expanduser()
    local_dir: Path = options.local_dir.expanduser()

    sources = read_sources(input_dir, preprocessor.columns)
    if not sources:
        if local_dir.resolve() != input_dir.resolve():
            raise DataError(f"--input_dir {input_dir} holds prepared files only; give the downloaded data set")
        _tell(f"{input_dir} is prepared already; nothing to do")
        return
    splits = convert_splits(sources, preprocessor.convert)
    keep_raw_files(sources, local_dir)
    write_splits(local_dir, splits)
    for split, records in splits.items():
        _tell(f"{local_dir / split}.json: {len(records)} records")


def convert_splits(sources: dict[str, list[SourceFile]], convert: Convert) -> dict[str, list[Record]]:
    """Convert every row; rows that cannot be used are all named in one error."""
    splits: dict[str, list[Record]] = {}
    problems: list[str] = []
    for split, files in sources.items():
        records = splits.setdefault(split, [])
        num_rows = 0
        for file in files:
            for index, row in enumerate(file.rows):
                try:
                    records.append(convert(row, split, num_rows))
                except DataError as error:
                    problems.append(f"{place(file.path, index)}: {error}")
                num_rows += 1
    raise_problems(problems)
    return splits


def keep_raw_files(sources: dict[str, list[SourceFile]], local_dir: Path) -> None:
    """Move a raw file that stands where the result goes to ``{split}.raw.json``, where the next run finds it."""
    for split, files in sources.items():
        output, aside = local_dir / f"{split}.json", local_dir / f"{split}.raw.json"
        if output.resolve() not in {file.path.resolve() for file in files}:
            continue
        if aside.exists():
            raise DataError(f"{output} is a raw file and {aside} exists too; remove one, or choose another --local_dir")
        output.rename(aside)
        _tell(f"{output} was the raw file; it is kept as {aside}")


def text_of(row: Row, column: str) -> str:
    """The text in a column; anything else is an error."""
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{column} is {type(value).__name__}, not text")
    return value


def exit_status(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command; what its user did wrong becomes one message on standard error and status 2."""
    try:
        main(arguments)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _tell(message: str) -> None:
    sys.stderr.write(message + "\n")
