"""Finds and reads the raw files of a data set as a download lays them out on disk."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from chatlearn.data.data_preprocess.records_file import RECORD_COLUMNS
from chatlearn.data.rows import READERS, Row, raise_problems, read_rows
from chatlearn.errors import DataError

SPLITS = ("train", "test")

# A download may hold the same rows several times, in folders named after configurations. The first folder of this
# list that has raw files is used alone; only when none has any do all other folders count.
PREFERRED_FOLDERS = ("main", ".", "data", "default")


@dataclass(frozen=True)
class SourceFile:
    """A raw file with its rows."""

    path: Path
    rows: tuple[Row, ...]


def read_sources(input_dir: Path, columns: Set[str]) -> dict[str, list[SourceFile]]:
    """The raw files of each split, ready to convert; every row is known to have ``columns``.

    Files that a preprocessor made are passed over. An empty result means that ``input_dir`` holds such files for every
    split and nothing raw: there is nothing to do.
    """
    if not input_dir.is_dir():
        raise DataError(f"--input_dir {input_dir}: there is no such directory; download the data set first")
    sources: dict[str, list[SourceFile]] = {}
    prepared: set[str] = set()
    for split in SPLITS:
        files = [SourceFile(path, tuple(read_rows(path))) for path in split_files(input_dir, split)]
        raw = [file for file in files if not file.rows[0].keys() >= RECORD_COLUMNS]
        if raw:
            sources[split] = _one_folder(input_dir, raw)
        elif files:
            prepared.add(split)
    if not sources and prepared == set(SPLITS):
        return {}
    missing = [split for split in SPLITS if split not in sources]
    if missing:
        raise DataError(
            f"--input_dir {input_dir}: no raw file for {' and '.join(missing)}; expected files named "
            f"{missing[0]}* ({', '.join(READERS)}) there or in its subfolders"
        )
    _require_columns([file for files in sources.values() for file in files], columns)
    return sources


def split_files(input_dir: Path, split: str) -> list[Path]:
    """The files of a split: its name begins the file's name, or is the name of a folder around it."""
    return sorted(
        path
        for path in input_dir.rglob("*")
        if path.suffix in READERS and _belongs(path.relative_to(input_dir), split) and path.is_file()
    )


def _belongs(path: Path, split: str) -> bool:
    names = path.parts
    # Hidden folders hold a download's own bookkeeping; socratic is GSM8K's second phrasing of the same problems.
    if any(name.startswith(".") or "socratic" in name for name in names):
        return False
    return re.match(rf"{split}(?![a-zA-Z])", path.name) is not None or split in names[:-1]


def _one_folder(input_dir: Path, files: list[SourceFile]) -> list[SourceFile]:
    by_folder: dict[str, list[SourceFile]] = {}
    for file in files:
        first, *others = file.path.relative_to(input_dir).parts
        by_folder.setdefault(first if others and first not in SPLITS else ".", []).append(file)
    chosen = next((by_folder[folder] for folder in PREFERRED_FOLDERS if folder in by_folder), files)
    suffixes = sorted({file.path.suffix for file in chosen})
    if len(suffixes) > 1:
        names = ", ".join(str(file.path) for file in chosen[:4])
        raise DataError(f"{names}: the same split in several formats ({', '.join(suffixes)}); keep one of them")
    return chosen


def _require_columns(files: list[SourceFile], columns: Set[str]) -> None:
    problems: list[str] = []
    for file in files:
        incomplete = [row for row in file.rows if not row.keys() >= columns]
        if incomplete:
            missing = sorted(columns - incomplete[0].keys())
            problems.append(
                f"{file.path} row {file.rows.index(incomplete[0]) + 1}: no column {', '.join(missing)}; "
                f"found {', '.join(sorted(incomplete[0]))} ({len(incomplete)} of {len(file.rows)} rows)"
            )
    raise_problems(problems)
