r"""Finds the final answer of a worked solution from the MATH data set: what its last box holds."""

from __future__ import annotations

import re

from chatlearn.errors import DataError

# \fbox is what a few solutions use in place of \boxed; it counts only where there is no \boxed.
BOX_COMMANDS = (r"\boxed", r"\fbox")

BARE_ANSWER = re.compile(r"\s*([^\s$]+)")  # \boxed 5 done -> 5


def boxed_answer(solution: str) -> str:
    r"""The content of the last ``\boxed{...}`` or ``\boxed X`` of a solution.

    >>> boxed_answer(r"so $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    for command in BOX_COMMANDS:
        _, found, rest = solution.rpartition(command)
        if found:
            return _content(rest.lstrip(), command)
    raise DataError(r"the solution has no \boxed{...}, so its answer is unknown; remove the row or box its answer")


def _content(text: str, command: str) -> str:
    if text.startswith("{"):
        depth = 0
        for position, character in enumerate(text):
            if character in "{}" and text[position - 1 : position] != "\\":  # \{ is a brace to print
                depth += 1 if character == "{" else -1
                if depth == 0:
                    return text[1:position]
        raise DataError(f"the solution's last {command}{{ is never closed")
    bare = BARE_ANSWER.match(text)
    if bare is None:
        raise DataError(f"the solution's last {command} holds nothing")
    return bare.group(1)
