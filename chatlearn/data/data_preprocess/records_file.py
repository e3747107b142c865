"""The data record that every preprocessor makes, and how the two split files reach the disk: whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from chatlearn.errors import DataError

Record = dict[str, object]

INSTRUCTION = " Let's think step by step and output the final answer within \\boxed{}."

# A file whose rows have all of these was made by a preprocessor, whatever its name.
RECORD_COLUMNS = frozenset({"data_source", "prompt", "reward_model"})


def build_record(
    question: str,
    ground_truth: str,
    data_source: str,
    split: str,
    index: int,
    kept_columns: Mapping[str, object] | None = None,
    extra_info: Mapping[str, object] | None = None,
) -> Record:
    """Make the record of one maths problem, keys in the order that users know.

    ``kept_columns`` are columns of the source that come first, as they are (``level`` and ``type`` of MATH);
    ``extra_info`` joins ``split`` and ``index``.
    """
    return {
        **(kept_columns or {}),
        "data_source": data_source,
        "prompt": [{"role": "user", "content": question + INSTRUCTION}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, **(extra_info or {})},
    }


def write_splits(local_dir: Path, splits: Mapping[str, Sequence[Record]]) -> None:
    """Write ``{split}.json`` (JSON lines) for every split into ``local_dir``, which is made if it is missing.

    All splits are complete on disk under temporary names before the first is published by renaming, so that a failure
    leaves the older files as they were.
    """
    try:
        local_dir.mkdir(parents=True, exist_ok=True)
        _publish(local_dir, splits)
    except OSError as error:
        raise DataError(f"{local_dir} cannot be written: {error}; choose another --local_dir") from error


def _publish(local_dir: Path, splits: Mapping[str, Sequence[Record]]) -> None:
    temporary = {split: local_dir / f".{split}.json.{os.getpid()}.tmp" for split in splits}
    try:
        for split, rows in splits.items():
            _write_rows(temporary[split], rows)
        for split, path in temporary.items():
            path.replace(local_dir / f"{split}.json")
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _write_rows(path: Path, rows: Sequence[Record]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before the content it names
