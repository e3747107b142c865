r"""The reward for mathematics: 1 where the last ``\boxed{}`` of an answer is the right result, else 0.

Cheap tests come first: the same text after tidying, then the same number, then the same word; only what is left goes
to math-verify. It compares what expressions *mean*, which is what we want for ``x+1`` and ``1+x`` and too generous in
places; so three kinds of answer do not reach it: numbers (see ``plain_number``), words, and answers with arithmetic
left undone.
A percent sign, a degree sign and a unit are not part of a number: ``50\%`` is 50 and is not 0.5.

An expression may keep a computer busy for hours, so this runs in a process with a deadline (``grade.Grader``).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from chatlearn.errors import ChatLearnError
from chatlearn.records import Completion, Prompt, Score
from chatlearn.reward.final_answer import final_answer
from chatlearn.reward.plain_number import plain_number

if TYPE_CHECKING:
    from sympy import Basic
    from sympy.matrices import MatrixBase

# Among the 5,000 gold answers of MATH's test split the longest has 81 characters and the deepest nesting is 3. Parsing
# 300 nested parentheses takes seconds. A longer answer can still equal a long gold one as text.
MAX_LENGTH = 400
MAX_NESTING = 12

# Decimals are compared to so many places: enough that an approximation of an exact result is not that result.
DECIMAL_PLACES = 12

TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
LAST_TEXT = re.compile(TEXT.pattern + r"(?:\^\{?\d\}?)?\s*$")  # the unit of an area has an exponent
LISTED = re.compile(r",(?:\s|\\[ ,;:]|\\q?quad|~)")
SPACING = re.compile(r"\\[,!;: ]|\\q?quad\b|~|\s+")
UNITS = re.compile(r"\\?%|\\?\$|\^\\circ|\^\{\\circ\}|\\degree\b|°")
# A name and an equals sign in front of a result: x=, f(3)=, \alpha_1=
NAME = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z]{1,2})(?:_(?:\w|\{\w+\}))?(?:\([\w,]*\))?=(?!=)")
WORDS = re.compile(r"[A-Za-z][A-Za-z .,'-]*[A-Za-z.]")
MAGNITUDES = re.compile(r"hundred|thousand|million|billion|trillion|dozen|score|percent", re.IGNORECASE)
REPLACEMENTS = {
    "\N{MINUS SIGN}": "-",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\left": "",
    r"\right": "",
    "{,}": ",",
}

# Two number literals with an operator between them that nothing else binds: the 2+3 of \sqrt{2+3}, not of x^2+3y.
UNDONE = re.compile(r"(?<![\w.^_)}\\])\d+(?:\.\d+)?(?:[+*-]|\\times|\\cdot|\\div)\d+(?:\.\d+)?(?![\w.\\({^!])(?!/)")


class UngradableError(ChatLearnError):
    """The gold answer itself cannot be read, so no answer can be compared with it."""


def boxed_math(prompt: Prompt, completion: Completion) -> Score:
    r"""Grade one answer; the part ``boxed`` tells whether there was a final ``\boxed`` at all."""
    answer = final_answer(prompt.text, completion.text)
    if answer is None:
        return Score(0.0, {"boxed": 0.0})
    right = same_text(answer, prompt.answer) or same_meaning(answer, prompt.answer)
    return Score(float(right), {"boxed": 1.0})


def gold_math(prompt: Prompt, completion: Completion) -> Score:
    """Grade without the comparison of texts: for trying whether a gold answer is recognised as itself."""
    answer = final_answer(prompt.text, completion.text)
    return Score(float(answer is not None and same_meaning(answer, prompt.answer)))


def same_text(answer: str, gold: str) -> bool:
    """Whether two answers are written alike, apart from spacing, units, and how fractions and text are set."""
    return tidy(answer) == tidy(gold)


def same_meaning(answer: str, gold: str) -> bool:
    """Whether two answers that are written differently say the same."""
    number = number_of(gold)
    if number is not None:
        return number_of(answer) == number
    words = TEXT.fullmatch(gold.strip())
    if words and WORDS.fullmatch(words[1].strip()):
        return tidy(answer).casefold() == tidy(gold).casefold()
    if _is_too_complex(gold):
        raise UngradableError(f"the gold answer is too long or nested too deeply to compare: {gold!r:.80}")
    if _is_too_complex(answer) or (UNDONE.search(tidy(answer)) and not UNDONE.search(tidy(gold))):
        return False
    return _verify(answer, gold)


def tidy(answer: str) -> str:
    """An answer without what does not change it: spacing, units, text commands, a name in front, a final full stop."""
    for old, new in REPLACEMENTS.items():
        answer = answer.replace(old, new)
    answer = SPACING.sub("", TEXT.sub(r"\1", UNITS.sub("", answer))).removesuffix(".")
    return NAME.sub("", answer, count=1) if NAME.match(answer) else answer


def number_of(answer: str) -> Fraction | None:
    r"""The number that an answer is, apart from a unit after it: ``5\text{ cm}`` is 5, but 5 million is not."""
    if LISTED.search(answer):  # 121, 484 are two numbers and 121,484 is one
        return None
    unit = LAST_TEXT.search(answer)
    if unit and unit.start() > 0 and not MAGNITUDES.search(unit[1]):
        answer = answer[: unit.start()]
    return plain_number(tidy(answer))


def _is_too_complex(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return len(text) > MAX_LENGTH or deepest > MAX_NESTING


def _verify(answer: str, gold: str) -> bool:
    """Ask math-verify; its own deadlines use signals and are off, for this process has one."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(expression: str) -> list[Basic | MatrixBase | str]:
        boxed = rf"\boxed{{{UNITS.sub('', expression)}}}"
        return parse(boxed, [LatexExtractionConfig(boxed_match_priority=0)], "no_fallback", parsing_timeout=0)

    parsed_gold = read(gold)
    if not parsed_gold:
        raise UngradableError(f"the gold answer cannot be read: {gold!r:.80}")
    return verify(parsed_gold, read(answer), float_rounding=DECIMAL_PLACES, timeout_seconds=None)
