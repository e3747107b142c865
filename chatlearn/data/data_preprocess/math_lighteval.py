"""Prepares the MATH-lighteval data set: problems with worked solutions, the answer in the solution's last box.

``python chatlearn/data/data_preprocess/math_lighteval.py --input_dir dataset/MATH-lighteval --local_dir
dataset/MATH-lighteval`` writes ``train.json`` and ``test.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python searches this folder first, and a file here could stand in for an installed package.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from typing import TYPE_CHECKING

from chatlearn.data.data_preprocess.boxed_solution import boxed_answer
from chatlearn.data.data_preprocess.command import Preprocessor, exit_status, prepare, text_of
from chatlearn.data.data_preprocess.records_file import Record, build_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.data.rows import Row

DATA_SOURCE = "DigitalLearningGmbH/MATH-lighteval"


def to_record(row: Row, split: str, index: int) -> Record:
    """The record of one problem; columns other than problem and solution are kept."""
    ground_truth = boxed_answer(text_of(row, "solution"))
    kept = {column: value for column, value in row.items() if column not in {"problem", "solution"}}
    return build_record(text_of(row, "problem"), ground_truth, DATA_SOURCE, split, index, kept_columns=kept)


MATH_LIGHTEVAL = Preprocessor(
    description="Prepare MATH-lighteval for training.",
    columns=frozenset({"problem", "solution"}),
    convert=to_record,
    default_dir="~/data/math",
)


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``; raises ``DataError`` where the data cannot be used."""
    prepare(MATH_LIGHTEVAL, arguments)


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
