"""The check of gold answers: who is tried, what is reported, and that a result is remembered for its data alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chatlearn.records import Prompt
from chatlearn.reward.gold_check import gold_check
from chatlearn.reward.grade import Grader, gold_prompts


def make_prompts(answers: Sequence[str], source: str = "aime24") -> list[Prompt]:
    return [Prompt(f"0_{index}", np.zeros(0, np.int32), "", source, answer) for index, answer in enumerate(answers)]


class Counting:
    """Finds fault with every answer, and counts how often it is asked."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def grade_gold(self, prompts: Sequence[Prompt]) -> list[str]:
        self.calls.append([prompt.uid for prompt in prompts])
        return [prompt.uid for prompt in prompts]


def test_answers_that_nobody_could_give_are_found(tmp_path: Path) -> None:
    prompts = make_prompts(["5", r"\frac{1}{2}", "x+1", "(((", "", r"\text{Yes}", "x" * 1000])
    with contextlib.closing(Grader(deadline_s=30.0)) as grader:
        result = gold_check(prompts, grader.grade_gold, tmp_path / "gold.json", "hash", seed=1)
        assert grader.grade_gold(make_prompts(["((("], source="openai/gsm8k")) != []
    assert (result.num_tried, result.num_ungradable) == (7, 3)
    assert [line.split(":")[0] for line in result.examples] == ["0_3", "0_4", "0_6"]
    assert result.summary == "3 of 7 gold answers cannot be graded"


def test_answers_of_other_rewards_are_passed_over() -> None:
    with contextlib.closing(Grader("chatlearn.reward.boxed_math:gold_math")) as grader:
        assert grader.grade_gold(make_prompts(["((("])) == []
    prompts = [*make_prompts(["1"]), *make_prompts(["2"], source="openai/gsm8k")]
    assert gold_prompts(prompts, None) == gold_prompts(prompts, "boxed_math") == prompts
    assert gold_prompts(prompts, "mine:reward") == []


def test_a_result_is_remembered_by_data_seed_and_size(tmp_path: Path) -> None:
    prompts = make_prompts([str(number) for number in range(30)])
    counting, ledger = Counting(), tmp_path / "deep/gold.json"
    first = gold_check(prompts, counting.grade_gold, ledger, "one", seed=1, num_samples=10)
    assert gold_check(prompts, counting.grade_gold, ledger, "one", seed=1, num_samples=10) == first
    assert len(counting.calls) == 1
    assert (first.num_tried, first.num_ungradable, len(first.examples)) == (10, 10, 5)
    gold_check(prompts, counting.grade_gold, ledger, "two", seed=1, num_samples=10)
    gold_check(prompts, counting.grade_gold, ledger, "one", seed=2, num_samples=10)
    assert len(counting.calls) == 3
    assert counting.calls[0] == counting.calls[1] != counting.calls[2]
    assert gold_check(prompts, counting.grade_gold, ledger, "one", seed=1, num_samples=10) == first
    assert len(counting.calls) == 3


def test_a_damaged_ledger_costs_a_new_check_and_nothing_else(tmp_path: Path) -> None:
    counting, ledger = Counting(), tmp_path / "gold.json"
    ledger.write_text("{half")
    assert gold_check(make_prompts(["1"]), counting.grade_gold, ledger, "one", seed=1).num_tried == 1
    assert len(counting.calls) == 1
