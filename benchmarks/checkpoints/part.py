"""What every part of ``benchmarks/checkpoint.py`` gives: a table, and whether its bound was kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A section of the results: lines of Markdown; ``passed`` is false where a bound was broken."""

    title: str
    lines: tuple[str, ...]
    passed: bool
