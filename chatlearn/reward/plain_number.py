r"""Reads an answer that is one number, exactly, and only in a form that a person would call finished.

Finished forms: ``72``, ``-1,000``, ``2.50``, ``.5``, ``\frac{3}{4}``, ``3/4``, ``2\frac{1}{2}``, ``10^{6}``,
``1.5 \times 10^{-3}``. A sum, a product, a power or a root of numbers is a computation left to the reader; so is a
fraction whose value is a whole number. A policy that could box ``48+24`` would be paid for not computing.
"""

from __future__ import annotations

import re
from fractions import Fraction

INTEGER = r"(?:\d+|\d{1,3}(?:,\d{3})+)"
DECIMAL = rf"(?:{INTEGER}(?:\.\d*)?|\.\d+)"
WHOLE_NUMBER = re.compile(rf"(?P<sign>[+-]?)(?P<number>{DECIMAL})")
FRACTION = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d*)"
    rf"(?:\\frac\{{(?P<top>-?{INTEGER})\}}\{{(?P<bottom>-?{INTEGER})\}}"
    r"|\\frac(?P<short_top>\d)(?P<short_bottom>\d))"
)
SLASH = re.compile(r"(?P<sign>[+-]?)(?P<top>\d+)/(?P<bottom>\d+)")
SCIENTIFIC = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<mantissa>{DECIMAL})(?:\\times|\\cdot))?10\^(?:\{{(?P<braced>[+-]?\d+)\}}|(?P<digit>\d))"
)

# Longer exponents and digit strings are nobody's answer, and exact arithmetic with them costs time.
MAX_EXPONENT = 300
MAX_LENGTH = 300


def plain_number(text: str) -> Fraction | None:
    """The value of a finished number, or ``None`` for everything else. ``text`` holds neither spaces nor units."""
    if len(text) > MAX_LENGTH:
        return None
    for pattern, value_of in ((WHOLE_NUMBER, _decimal), (FRACTION, _fraction), (SLASH, _slash), (SCIENTIFIC, _power)):
        match = pattern.fullmatch(text)
        if match:
            value = value_of(match)
            return -value if value is not None and match["sign"] == "-" else value
    return None


def _decimal(match: re.Match[str]) -> Fraction:
    return Fraction(match["number"].replace(",", "").rstrip("."))


def _fraction(match: re.Match[str]) -> Fraction | None:
    part = _reduced(match["top"] or match["short_top"], match["bottom"] or match["short_bottom"])
    return None if part is None else int(match["whole"] or 0) + part


def _slash(match: re.Match[str]) -> Fraction | None:
    return _reduced(match["top"], match["bottom"])


def _reduced(top: str, bottom: str) -> Fraction | None:
    """The quotient; ``None`` where it is whole, for then the division was not carried out."""
    numerator, denominator = int(top.replace(",", "")), int(bottom.replace(",", ""))
    if denominator == 0:
        return None
    value = Fraction(numerator, denominator)
    return None if value.denominator == 1 else value


def _power(match: re.Match[str]) -> Fraction | None:
    mantissa = Fraction((match["mantissa"] or "1").replace(",", "").rstrip("."))
    exponent = int(match["braced"] or match["digit"])
    if not 1 <= mantissa < 10 or abs(exponent) > MAX_EXPONENT:
        return None
    return mantissa * Fraction(10) ** exponent
