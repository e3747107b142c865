r"""What the mathematics reward calls right: the original's table, what is better here, and what must earn nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.data.data_preprocess.boxed_solution import boxed_answer
from chatlearn.records import Completion, Prompt
from chatlearn.reward.boxed_math import UngradableError, boxed_math, gold_math, same_meaning, same_text
from chatlearn.reward.final_answer import final_answer
from chatlearn.reward.plain_number import plain_number

NOTHING = np.zeros(0)


def grade(text: str, gold: str, prompt_text: str = "") -> float:
    prompt = Prompt("0_0", NOTHING.astype(np.int32), prompt_text, "openai/gsm8k", gold)
    completion = Completion(NOTHING.astype(np.int32), NOTHING.astype(np.float32), text, "stop", ())
    score = boxed_math(prompt, completion)
    assert score.parts["boxed"] == (final_answer(prompt_text, text) is not None)
    return score.value


ORIGINAL_GIVES_ONE = [
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"\boxed{.5}", "1/2"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{4} no, \boxed{5}", "5"),
    (r"\boxed{10\%}", "10"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{\$5}", "5"),
    (r"\boxed{(1, 2)}", "(1,2)"),
    (r"\boxed{\dfrac{3}{4}}", r"\frac34"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{}", ""),
]
ORIGINAL_GIVES_NONE_AND_SO_DO_WE = [
    (r"\fbox{7}", "7"),
    ("7", "7"),
    (r"\boxed{7", "7"),
]
# The original compares texts; we compare what they mean. LaTeX sets "\boxed {7}" like "\boxed{7}".
ORIGINAL_GIVES_NONE_AND_WE_ONE = [
    (r"\boxed{0.25}", r"\frac{1}{4}"),
    (r"\boxed{2.0}", "2"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{\text{Yes}}", "Yes"),
    (r"\boxed{a/b}", r"\frac{a}{b}"),
    (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}"),
    (r"\boxed {7}", "7"),
    (r"\boxed 1, or rather \boxed{2}", "2"),
    (r"\boxed{x+1}", "1+x"),
]
ALSO_RIGHT = [
    (r"\boxed 5", "5"),
    (r"\boxed{10,\!000}", "10000"),
    (r"\boxed{1.5 \times 10^{3}}", "1500"),
    (r"\boxed{10^6}", "1000000"),
    (r"\boxed{2\frac{1}{2}}", r"\frac{5}{2}"),
    (r"\boxed{12/5525}", r"\frac{12}{5,\!525}"),
    (r"\boxed{2/4}", r"\frac{1}{2}"),
    (r"\boxed{f(3) = -7.}", "-7"),
    ("\\boxed{\N{MINUS SIGN}3}", "-3"),
    (r"\boxed{\text{yes}}", r"\text{Yes}"),
    (r"\boxed{A}", r"\text{(A)}"),
    (r"\boxed{5+3\sqrt{2}}", r"3\sqrt2+5"),
    (r"\boxed{2, 1}", "1,2"),
    (r"\boxed{484, 121}", "121, 484"),
    (r"\boxed{\left(\frac12, 3\right)}", r"(\frac{1}{2},3)"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"<think>\boxed{4}</think> so \boxed{5}", "5"),
]
# What math-verify, or an eager policy, would like to count.
EARNS_NOTHING = [
    ("The answer is 5.", "5"),
    (r"\boxed{5+5}", "10"),
    (r"\boxed{2 \cdot 5}", "10"),
    (r"\boxed{20/2}", "10"),
    (r"\boxed{\frac{20}{2}}", "10"),
    (r"\boxed{\sqrt{100}}", "10"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{48/2+24 = 48}", "48"),
    (r"\boxed{0.3333333}", r"\frac{1}{3}"),
    (r"\boxed{1.414214}", r"\sqrt{2}"),
    (r"\boxed{\sqrt{1+1}}", r"\sqrt{2}"),
    (r"\boxed{(1+2, 4)}", "(3,4)"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{0.5}", r"50\%"),
    (r"\boxed{5 \text{ million}}", "5"),
    (r"\boxed{5x}", "5"),
    (r"\boxed{4, 5}", "5"),
    (r"\boxed{5 \text{ or } 6}", "5"),
    (r"\boxed{5} \boxed{6}", "5"),
    (r"\boxed{5} and then \boxed{6", "5"),
    (r"\boxed{seY}", r"\text{Yes}"),
    (r"\boxed{\pi \text{ or } 3}", r"\pi"),
    (r"\boxed{[1,2]}", "(1,2)"),
    (r"\boxed{\frac{1}{0}}", "0"),
    (r"\boxed{10^{999999999}}", "1"),
    (r"\boxed{}", "5"),
    ("", "5"),
    (r"<think> \boxed{5}", "5"),
    (r"<think> \boxed{5} </think> I do not know", "5"),
    (r"<think></think> Wait. <think> \boxed{5}", "5"),
]


@pytest.mark.parametrize(("text", "gold"), ORIGINAL_GIVES_ONE + ORIGINAL_GIVES_NONE_AND_WE_ONE + ALSO_RIGHT, ids=repr)
def test_right(text: str, gold: str) -> None:
    assert grade(text, gold) == 1.0


@pytest.mark.parametrize(("text", "gold"), ORIGINAL_GIVES_NONE_AND_SO_DO_WE + EARNS_NOTHING, ids=repr)
def test_not_right(text: str, gold: str) -> None:
    assert grade(text, gold) == 0.0


def test_a_thought_may_begin_in_the_prompt() -> None:
    assert grade(r"\boxed{5}", "5", prompt_text="assistant\n<think>\n") == 0.0
    assert grade(r"hm</think>\boxed{5}", "5", prompt_text="assistant\n<think>\n") == 1.0
    assert grade(r"\boxed{5}", "5", prompt_text="assistant\n<think>\n\n</think>\n\n") == 1.0


def test_expressions_too_large_to_parse_are_wrong_at_once() -> None:
    assert grade(r"\boxed{" + "(" * 300 + "x" + ")" * 300 + "}", "x") == 0.0
    assert grade(r"\boxed{" + "+".join(f"x^{{{power}}}" for power in range(800)) + "}", "x") == 0.0


def test_a_long_gold_answer_is_still_equal_to_itself() -> None:
    gold = "+".join(f"x^{{{power}}}" for power in range(200))
    assert grade(rf"\boxed{{{gold}}}", gold) == 1.0
    with pytest.raises(UngradableError):
        same_meaning("x", gold)


def test_gold_is_tried_past_the_comparison_of_texts() -> None:
    prompt = Prompt("0_0", NOTHING.astype(np.int32), "", "aime24", "(((")
    completion = Completion(NOTHING.astype(np.int32), NOTHING.astype(np.float32), r"\boxed{(((}", "stop", ())
    assert boxed_math(prompt, completion).value == 1.0
    with pytest.raises(UngradableError, match="cannot be read"):
        gold_math(prompt, completion)


laws = settings(max_examples=200, deadline=None, derandomize=True)
tokens = st.sampled_from(
    [*"0123456789+-*/^_{}()[],.= x\\$%", r"\boxed", r"\frac", r"\text{", "<think>", "</think>", "é"]
)
soup = st.lists(tokens, max_size=40).map("".join)


@laws
@given(text=soup)
def test_any_text_gets_a_verdict_against_a_number(text: str) -> None:
    assert grade(text, "12") in (0.0, 1.0)


@laws
@given(number=st.integers(-(10**9), 10**9))
def test_a_number_equals_itself_and_nothing_else(number: int) -> None:
    assert grade(rf"\boxed{{{number:,}}}", str(number)) == 1.0
    assert grade(rf"\boxed{{{number + 1}}}", str(number)) == 0.0
    assert grade(rf"\boxed{{{number}.000}}", str(number)) == 1.0


@laws
@given(top=st.integers(-99, 99), bottom=st.integers(1, 99))
def test_a_fraction_is_finished_unless_it_is_whole(top: int, bottom: int) -> None:
    value = plain_number(rf"\frac{{{top}}}{{{bottom}}}")
    assert value == (None if top % bottom == 0 else plain_number(f"{top}/{bottom}"))


@laws
@given(text=soup)
def test_texts_equal_themselves_whatever_their_spacing(text: str) -> None:
    assert same_text(text, "  " + text.replace("=", " = "))


@laws
@given(inside=st.text("ab{}\\1", max_size=12), before=st.text("ab $", max_size=5))
def test_solutions_and_answers_have_their_box_in_the_same_place(inside: str, before: str) -> None:
    text = rf"{before}\boxed{{{inside}}} end"
    answer = final_answer("", text)
    if answer is not None:
        assert boxed_answer(text) == answer
