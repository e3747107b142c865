"""The lessons of the embedded models: true columns, mixed quality, and never a test question."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.data.data_preprocess.arithmetic import RANGES, Problem, draw_problem
from embedded.lessons import Lesson, columns, draw_lesson, is_right, worked

problems = st.builds(draw_problem, st.builds(random.Random, st.integers(0, 2**32)), st.sampled_from(tuple(RANGES)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems)
def test_every_column_is_true_and_the_digits_spell_the_answer(problem: Problem) -> None:
    _, *lines = columns(problem).splitlines()
    results = [line.split("=") for line in lines]
    for left, result in results:
        numbers = [int(number) for number in left.replace("-", "+").split("+")]
        assert int(result) == (numbers[0] - numbers[1] if "-" in left else sum(numbers))
    digits = [result[-1] for _, result in results[:-1]] + [results[-1][1]]
    assert int("".join(reversed(digits))) == problem.answer
    assert is_right(worked(problem), problem)


def test_every_way_of_answering_has_its_share() -> None:
    generator = random.Random(0)
    lessons = [draw_lesson(generator) for _ in range(4_000)]
    shares = Counter(_way(lesson) for lesson in lessons)
    expected = {"worked": 0.4, "guess": 0.3, "terse": 0.1, "without box": 0.2}
    assert {way: round(count / len(lessons), 1) for way, count in shares.items()} == expected
    assert 0.55 < sum(is_right(lesson.answer, lesson.problem) for lesson in lessons) / len(lessons) < 0.63
    guesses = [lesson for lesson in lessons if _way(lesson) == "guess"]
    assert 0.25 < sum(is_right(lesson.answer, lesson.problem) for lesson in guesses) / len(guesses) < 0.35


def test_no_lesson_is_about_a_test_question() -> None:
    generator = random.Random(1)
    assert all(draw_lesson(generator).problem.split == "train" for _ in range(2_000))


def _way(lesson: Lesson) -> str:
    if "box" not in lesson.answer:
        return "without box"
    first_word = lesson.answer.split()[0]
    return {"I": "guess", "The": "terse"}.get(first_word, "worked")
