"""Prepares the GSM8K data set: word problems whose worked answers end with ``#### number``.

``python chatlearn/data/data_preprocess/gsm8k.py --input_dir dataset/gsm8k --local_dir dataset/gsm8k`` writes
``train.json`` and ``test.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python searches this folder first, and a file here could stand in for an installed package.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from typing import TYPE_CHECKING

from chatlearn.data.data_preprocess.command import Preprocessor, exit_status, prepare, text_of
from chatlearn.data.data_preprocess.records_file import Record, build_record
from chatlearn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.data.rows import Row

DATA_SOURCE = "openai/gsm8k"
ANSWER_MARK = "#### "


def to_record(row: Row, split: str, index: int) -> Record:
    """The record of one problem; the source's question and worked answer go along in ``extra_info``."""
    question, answer = text_of(row, "question"), text_of(row, "answer")
    kept = {column: value for column, value in row.items() if column not in {"question", "answer"}}
    return build_record(
        question,
        final_number(answer),
        DATA_SOURCE,
        split,
        index,
        kept_columns=kept,
        extra_info={"answer": answer, "question": question},
    )


def final_number(answer: str) -> str:
    """What follows the last ``####`` of a worked answer, without thousands separators."""
    _, mark, number = answer.rpartition(ANSWER_MARK)
    number = number.strip().replace(",", "")
    if not mark or not number:
        raise DataError(f"the answer has no number after '{ANSWER_MARK}', so it is unknown; remove the row or mend it")
    return number


GSM8K = Preprocessor(
    description="Prepare GSM8K for training.",
    columns=frozenset({"question", "answer"}),
    convert=to_record,
    default_dir="~/data/gsm8k",
)


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``; raises ``DataError`` where the data cannot be used."""
    prepare(GSM8K, arguments)


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
