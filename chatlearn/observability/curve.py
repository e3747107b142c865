"""A small learning curve for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

# Five labels fit below sixty columns without touching each other.
MAX_TICKS = 5
NUM_ROWS = 14


def read_curve(path: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every line of ``metrics.jsonl`` that has a number called ``name``."""
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def draw_curve(points: Sequence[tuple[int, float]], title: str, num_columns: int) -> str:
    """The curve as text with axes, at least from 0 to 1 upwards; nothing for fewer than two points."""
    if len(points) < 2:
        return ""
    import plotext  # it loads a compiled kernel that only the end of a run needs

    steps = [step for step, _ in points]
    values = [value for _, value in points]
    figure = plotext.figure
    figure.clear()
    signal = figure.signal(steps, values, marker="braille")
    signal.lines()
    figure.draw(signal)
    figure.plot_size(num_columns, NUM_ROWS)
    figure.title(title)
    figure.label("episode")
    ticks = tick_steps(steps)
    figure.ruler("x", "lower").ticks(ticks, [str(step) for step in ticks])
    figure.ruler("y", "left").lim(min(0.0, *values), max(1.0, *values))
    drawing = str(plotext.uncolorize(figure.build().string()))
    return "\n".join(line.rstrip() for line in drawing.splitlines())


def tick_steps(steps: Sequence[int]) -> list[int]:
    """First and last step and some between them, evenly.

    >>> tick_steps(range(1, 16))
    [1, 4, 8, 12, 15]
    """
    if len(steps) <= MAX_TICKS:
        return list(steps)
    gap = (len(steps) - 1) / (MAX_TICKS - 1)
    return [steps[int(position * gap)] for position in range(MAX_TICKS)]
