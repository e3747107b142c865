"""What every reward function must keep, ours and a user's.

Yours: ``pytest tests/contracts/test_reward_contract.py --plugin=package.module:function``.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest

from chatlearn.records import Completion, Prompt, Rollout, Score
from chatlearn.reward.grade import DEADLINE_S, Grader

GARBAGE = (
    "",
    " ",
    "\\boxed{",
    "\\boxed{}",
    "}" * 50 + "\\boxed{1}",
    "\\boxed{" * 200,
    "{" * 5000,
    "\\boxed{" + "(" * 2000 + ")" * 2000 + "}",
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{" + "9" * 10_000 + "}",
    "<think>" * 100,
    "</think>" * 100,
    "\x00\x07\ud7ff\uffff\u202e\U0001f914",
    "```python\nimport os\nos._exit(1)\n```",
    "__import__('os')._exit(1)",
    "word " * 20_000,
)
HONEST = ("It is \\boxed{2}.", "It is \\boxed{3}.", "2", "I do not know.")


def noise(seed: int) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice("\\{}()[]^_$%&#0123456789abcdefx+-*/=., \n") for _ in range(200))


TEXTS = (*HONEST, *GARBAGE, *(noise(seed) for seed in range(20)))


@pytest.fixture(scope="module")
def grader(request: pytest.FixtureRequest) -> Iterator[Grader]:
    function: str = request.config.getoption("--plugin", default=None) or "boxed_math"
    with contextlib.closing(Grader(function, deadline_s=DEADLINE_S)) as grader:
        yield grader


def scores_of(grader: Grader, texts: tuple[str, ...]) -> tuple[Score, ...]:
    prompt = Prompt("0_0", np.arange(4, dtype=np.int32), "What is 1+1?", "boxed_math", "2")
    completions = tuple(Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop", ()) for text in texts)
    (graded,) = grader.grade([Rollout(prompt, completions)])
    return graded.scores


@pytest.fixture(scope="module")
def scores(grader: Grader) -> tuple[Score, ...]:
    return scores_of(grader, TEXTS)


def test_it_survives_garbage_within_the_deadline(scores: tuple[Score, ...]) -> None:
    assert {text[:40]: score.error for text, score in zip(TEXTS, scores, strict=True) if score.error} == {}


def test_it_is_finite(scores: tuple[Score, ...]) -> None:
    assert all(math.isfinite(number) for score in scores for number in (score.value, *score.parts.values()))


def test_it_is_deterministic_and_judges_each_answer_by_itself(grader: Grader, scores: tuple[Score, ...]) -> None:
    assert scores_of(grader, TEXTS[::-1])[::-1] == scores


def test_it_tells_answers_apart(scores: tuple[Score, ...]) -> None:
    assert len({score.value for score in scores}) > 1
