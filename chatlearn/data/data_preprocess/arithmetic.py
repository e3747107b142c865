"""Makes arithmetic questions in the form of the MATH records: what the embedded model trains on, without any download.

``python chatlearn/data/data_preprocess/arithmetic.py --local_dir dataset/arithmetic`` writes ``train.json`` and
``test.json``. Prealgebra asks for sums and differences, Algebra for the unknown of ``x+a=b`` and ``x-a=b``; the level
says how long the numbers are. All numbers and answers are whole and not negative.

A question's own checksum decides whether it may be asked in training or in testing. So no train set, of any size and
seed, shares a question with any test set, and neither did the warm-up of the embedded model.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python searches this folder first, and a file here could stand in for an installed package.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import argparse
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from chatlearn.data.data_preprocess.command import exit_status
from chatlearn.data.data_preprocess.records_file import Record, build_record, write_splits
from chatlearn.errors import DataError

Operation = Literal["+", "-"]
Kind = Literal["Prealgebra", "Algebra"]
Split = Literal["train", "test"]

DATA_SOURCE = "DigitalLearningGmbH/MATH-lighteval"
KINDS: tuple[Kind, ...] = ("Prealgebra", "Algebra")
OPERATIONS: tuple[Operation, ...] = ("+", "-")

# The ranges of the two numbers, level by level, ends included.
RANGES: Mapping[int, tuple[tuple[int, int], tuple[int, int]]] = {
    1: ((1, 20), (1, 20)),
    2: ((10, 99), (1, 9)),
    3: ((10, 99), (10, 99)),
    4: ((100, 999), (10, 99)),
    5: ((100, 999), (100, 999)),
}

TEST_SHARE = 8  # one question in eight is a test question
MAX_DRAWS = 10_000  # so many repeats in a row mean that a level has no unused questions left


@dataclass(frozen=True)
class Problem:
    """A question and the computation that answers it: ``first operation second``, which is never negative."""

    level: int
    kind: Kind
    first: int
    operation: Operation
    second: int

    @property
    def answer(self) -> int:
        """The one right answer."""
        return self.first + self.second if self.operation == "+" else self.first - self.second

    @property
    def question(self) -> str:
        """The sentence a person reads; in Algebra the unknown is the result of the computation."""
        if self.kind == "Prealgebra":
            return f"What is ${self.first}{self.operation}{self.second}$?"
        opposite = "-" if self.operation == "+" else "+"
        return f"Solve $x{opposite}{self.second}={self.first}$ for $x$."

    @property
    def split(self) -> Split:
        """Where this question may be asked: a property of the question alone, whatever the seed and the sizes."""
        return "test" if zlib.crc32(self.question.encode()) % TEST_SHARE == 0 else "train"


def draw_problem(generator: random.Random, level: int) -> Problem:
    """Draw one problem of a level; the numbers of a difference are swapped where it would be negative."""
    first, second = (generator.randint(*bounds) for bounds in RANGES[level])
    kind = generator.choice(KINDS)
    operation = generator.choice(OPERATIONS)
    if operation == "-" and first < second:
        first, second = second, first
    return Problem(level, kind, first, operation, second)


def draw_split(split: Split, size: int, seed: int) -> list[Problem]:
    """Draw ``size`` different problems of one split, the five levels in turn; a larger size only adds to the end.

    Raises ``DataError`` when the shortest numbers have no more questions to offer.
    """
    generator = random.Random(f"{split} {seed}")
    levels = tuple(RANGES)
    drawn: dict[str, Problem] = {}  # by question: two levels can ask the same one
    draws_in_vain = 0
    while len(drawn) < size:
        problem = draw_problem(generator, levels[len(drawn) % len(levels)])
        if problem.split == split and problem.question not in drawn:
            drawn[problem.question] = problem
            draws_in_vain = 0
            continue
        draws_in_vain += 1
        if draws_in_vain == MAX_DRAWS:
            raise DataError(
                f"--{split}_size={size} asks for more different questions than there are;"
                f" use at most {len(drawn)} with this seed"
            )
    return list(drawn.values())


def to_records(problems: Sequence[Problem], split: Split) -> list[Record]:
    """Give the problems the form of MATH records, keys in the original's order."""
    return [
        build_record(
            problem.question,
            str(problem.answer),
            DATA_SOURCE,
            split,
            index,
            kept_columns={"level": f"Level {problem.level}", "type": problem.kind},
        )
        for index, problem in enumerate(problems)
    ]


def main(arguments: Sequence[str]) -> None:
    """Write both splits as the command line asks; raises ``DataError`` where that cannot be done."""
    parser = argparse.ArgumentParser(description="Write arithmetic questions in the form of the MATH records.")
    parser.add_argument(
        "--local_dir", type=Path, default=Path("dataset/arithmetic"), help="folder to write into (dataset/arithmetic)"
    )
    parser.add_argument("--train_size", type=int, default=2_000, help="number of training questions (2000)")
    parser.add_argument("--test_size", type=int, default=200, help="number of test questions (200)")
    parser.add_argument("--seed", type=int, default=0, help="which questions; the same seed gives the same files (0)")
    options = parser.parse_args(arguments)
    sizes: dict[Split, int] = {"train": options.train_size, "test": options.test_size}
    for split, size in sizes.items():
        if size < 1:
            raise DataError(f"--{split}_size={size} is not a number of questions; use 1 or more")
    local_dir: Path = options.local_dir.expanduser()
    write_splits(
        local_dir,
        {split: to_records(draw_split(split, size, options.seed), split) for split, size in sizes.items()},
    )


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
