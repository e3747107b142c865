r"""Finds what a model gives as its final answer: the last box after its thinking."""

from __future__ import annotations

import re

THINK_OPENS, THINK_CLOSES = "<think>", "</think>"
BOX = r"\boxed"

BARE_ANSWER = re.compile(r"\s+([^\s$]+)")  # \boxed 5


def final_answer(prompt_text: str, completion_text: str) -> str | None:
    r"""The content of the last ``\boxed`` of an answer, or ``None`` where there is none.

    What stands inside ``<think>`` is not an answer, and a thought that never ended leaves none; some chat templates
    open the thought in the prompt. Only the last box counts: where it is cut off, an earlier one is not the answer.

    >>> final_answer("", r"<think>\boxed{1}</think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    if prompt_text.rstrip().endswith(THINK_OPENS):
        completion_text = THINK_OPENS + completion_text
    spoken = completion_text.rpartition(THINK_CLOSES)[2]
    if THINK_OPENS in spoken:
        return None
    _, found, rest = spoken.rpartition(BOX)
    if not found:
        return None
    if rest.lstrip().startswith("{"):
        return _braced(rest.lstrip())
    bare = BARE_ANSWER.match(rest)
    return bare.group(1) if bare else None


def _braced(text: str) -> str | None:
    depth = 0
    for position, character in enumerate(text):
        if character in "{}" and text[position - 1 : position] != "\\":  # \{ is a brace to print
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[1:position]
    return None
