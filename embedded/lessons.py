"""The worked answers of mixed quality that the embedded models are warmed up on.

A model that has seen one way of answering has nothing to choose from. These lessons show a good way, column by column
with a box around the result, next to guesses, bare claims and work that forgets the box: so about a third of the
sampled answers earn a reward, and what GRPO teaches afterwards is which way to take, not new arithmetic.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from chatlearn.data.data_preprocess.arithmetic import RANGES, Problem, draw_problem
from chatlearn.data.data_preprocess.records_file import INSTRUCTION

RIGHT_GUESSES = 0.3  # share of the guesses that hit


@dataclass(frozen=True)
class Lesson:
    """A problem, and what the assistant is shown to answer."""

    problem: Problem
    answer: str

    @property
    def question(self) -> str:
        """What the user says."""
        return self.problem.question + INSTRUCTION


def columns(problem: Problem) -> str:
    """Work a sum or difference from the last digit to the first, one line for each column.

    A line of a sum adds the two digits and the carry and shows both digits of the result; a line of a difference has
    already taken the borrow off the upper digit.

    >>> print(columns(Problem(3, "Prealgebra", 47, "+", 85)))
    47+85
    7+5+0=12
    4+8+1=13
    >>> print(columns(Problem(3, "Prealgebra", 85, "-", 47)))
    85-47
    15-7=8
    7-4=3
    """
    lines = [f"{problem.first}{problem.operation}{problem.second}"]
    carried = 0
    length = max(len(str(problem.first)), len(str(problem.second)))
    for place in range(length):
        upper = problem.first // 10**place % 10
        lower = problem.second // 10**place % 10
        if problem.operation == "+":
            total = upper + lower + carried
            lines.append(f"{upper}+{lower}+{carried}={total}")
            carried = total // 10
        else:
            upper -= carried
            carried = int(upper < lower)
            upper += 10 * carried
            lines.append(f"{upper}-{lower}={upper - lower}")
    return "\n".join(lines)


def worked(problem: Problem) -> str:
    """The good way: every column, then the result in its box."""
    return f"{columns(problem)}\n\\boxed{{{problem.answer}}}"


def without_box(problem: Problem) -> str:
    """Right work, but the result is not where it was asked for."""
    return f"{columns(problem)}\nThe answer is {problem.answer}."


def terse(problem: Problem) -> str:
    """The right result and nothing else: more than so small a model can do in its head."""
    return f"The answer is \\boxed{{{problem.answer}}}."


def guess(problem: Problem, generator: random.Random) -> str:
    """A result that is often near and mostly wrong."""
    wrong = problem.answer + generator.choice((-11, -10, -2, -1, 1, 2, 10, 11))
    value = problem.answer if generator.random() < RIGHT_GUESSES else abs(wrong)
    return f"I guess \\boxed{{{value}}}."


def draw_lesson(generator: random.Random) -> Lesson:
    """Draw a training question of any level with an answer of any quality; test questions are never shown."""
    problem = draw_problem(generator, generator.choice(tuple(RANGES)))
    while problem.split == "test":
        problem = draw_problem(generator, problem.level)
    quality = generator.random()
    if quality < 0.4:
        answer = worked(problem)
    elif quality < 0.7:
        answer = guess(problem, generator)
    elif quality < 0.8:
        answer = terse(problem)
    else:
        answer = without_box(problem)
    return Lesson(problem, answer)


def is_right(answer: str, problem: Problem) -> bool:
    """Whether the last box of the answer holds exactly the number."""
    return answer.rpartition("\\boxed{")[2].partition("}")[0] == str(problem.answer)
