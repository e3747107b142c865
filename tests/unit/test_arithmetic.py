"""The arithmetic questions: right, in the form of the MATH records, repeatable, and never shared by the two splits."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.data.data_preprocess import arithmetic
from chatlearn.data.data_preprocess.arithmetic import RANGES, Problem, draw_problem, draw_split, main, to_records
from chatlearn.errors import DataError

PLAIN = re.compile(r"What is \$(\d+)([+-])(\d+)\$\?")
EQUATION = re.compile(r"Solve \$x([+-])(\d+)=(\d+)\$ for \$x\$\.")

problems = st.builds(draw_problem, st.builds(random.Random, st.integers(0, 2**32)), st.sampled_from(tuple(RANGES)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems)
def test_the_answer_solves_the_question_as_it_is_written(problem: Problem) -> None:
    if problem.kind == "Prealgebra":
        match = PLAIN.fullmatch(problem.question)
        assert match
        first, sign, second = match.groups()
        assert problem.answer == (int(first) + int(second) if sign == "+" else int(first) - int(second))
    else:
        match = EQUATION.fullmatch(problem.question)
        assert match
        sign, number, result = match.groups()
        left = problem.answer + int(number) if sign == "+" else problem.answer - int(number)
        assert left == int(result)
    assert problem.answer >= 0


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_no_train_question_of_any_seed_is_a_test_question_of_any_seed(train_seed: int, test_seed: int) -> None:
    train = [problem.question for problem in draw_split("train", 500, train_seed)]
    test = [problem.question for problem in draw_split("test", 100, test_seed)]
    assert not set(train) & set(test)
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)


def test_a_split_depends_on_its_seed_and_a_larger_one_begins_with_the_smaller() -> None:
    assert draw_split("train", 50, 3) == draw_split("train", 80, 3)[:50]
    assert draw_split("train", 50, 3) != draw_split("train", 50, 4)


def test_all_levels_and_types_occur_and_one_question_in_eight_is_for_testing() -> None:
    drawn = draw_split("train", 200, 0)
    assert {(problem.level, problem.kind, problem.operation) for problem in drawn} == {
        (level, kind, operation) for level in RANGES for kind in arithmetic.KINDS for operation in arithmetic.OPERATIONS
    }
    generator = random.Random(0)
    shares = [sum(draw_problem(generator, level).split == "test" for _ in range(4_000)) / 4_000 for level in RANGES]
    assert all(0.10 < share < 0.15 for share in shares)


def test_records_have_the_keys_of_math_in_their_order() -> None:
    problem = Problem(4, "Algebra", 653, "-", 80)
    (record,) = to_records([problem], "test")
    assert list(record.items()) == [
        ("level", "Level 4"),
        ("type", "Algebra"),
        ("data_source", "DigitalLearningGmbH/MATH-lighteval"),
        (
            "prompt",
            [
                {
                    "role": "user",
                    "content": "Solve $x+80=653$ for $x$. Let's think step by step and output the final answer within"
                    " \\boxed{}.",
                }
            ],
        ),
        ("ability", "math"),
        ("reward_model", {"style": "rule", "ground_truth": "573"}),
        ("extra_info", {"split": "test", "index": 0}),
    ]


def test_the_command_writes_both_files_alike_each_time(tmp_path: Path) -> None:
    script = str(Path(arithmetic.__file__))
    sizes = ["--train_size", "30", "--test_size", "10", "--seed", "7"]
    subprocess.run([sys.executable, script, "--local_dir", str(tmp_path / "by_command"), *sizes], check=True)
    main(["--local_dir", str(tmp_path / "by_call"), *sizes])
    for split, size in (("train", 30), ("test", 10)):
        text = (tmp_path / "by_command" / f"{split}.json").read_text()
        assert text == (tmp_path / "by_call" / f"{split}.json").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        assert [record["extra_info"] for record in records] == [
            {"split": split, "index": index} for index in range(size)
        ]
    assert sorted(path.name for path in (tmp_path / "by_command").iterdir()) == ["test.json", "train.json"]


@pytest.mark.parametrize(("option", "size"), [("--train_size", "0"), ("--test_size", "-3"), ("--test_size", "100000")])
def test_an_impossible_size_is_named_and_nothing_is_written(tmp_path: Path, option: str, size: str) -> None:
    with pytest.raises(DataError, match=f"{option}={size}"):
        main(["--local_dir", str(tmp_path / "new"), option, size])
    assert not (tmp_path / "new").exists()
