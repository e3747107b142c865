"""Draws a run's learning curve for the README: python benchmarks/learning_curve.py output/quickstart-1.

Reads ``metrics.jsonl`` alone: the mean reward of every episode, and the evaluations where there are any. Needs
matplotlib, one of the development tools (``bash scripts/install.sh auto --dev``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

REWARD = "rollout/reward_mean"
PICTURE = Path("docs/learning_curve.png")
# Blue and orange of the Okabe-Ito palette, which colour-blind readers can tell apart.
REWARD_COLOUR, EVALUATION_COLOUR = "#0072b2", "#d55e00"


@dataclass(frozen=True)
class Curve:
    """``rewards`` and ``evaluations`` by episode; an evaluation at 0 is of the untrained model."""

    rewards: Mapping[int, float]
    evaluations: Mapping[int, float]
    samples_per_prompt: int  # the k of the evaluations' avg@k; 0 without evaluations


def read_curve(metrics_file: Path) -> Curve:
    """Collect the two series; of several data sources the first one stands for the evaluation."""
    rewards: dict[int, float] = {}
    evaluations: dict[int, float] = {}
    chosen: str | None = None
    for line in metrics_file.read_text().splitlines():
        # The journal writes an object of numbers on every line.
        numbers = cast("dict[str, float]", json.loads(line))
        step = int(numbers["step"])
        if REWARD in numbers:
            rewards[step] = numbers[REWARD]
        averages = [name for name in numbers if name.startswith("eval/") and "/avg@" in name]
        chosen = chosen or (averages[0] if averages else None)
        if chosen is not None and chosen in numbers:
            evaluations[step] = numbers[chosen]
    return Curve(rewards, evaluations, int(chosen.rpartition("@")[2]) if chosen else 0)


def draw(curve: Curve, picture: Path) -> None:
    """Write the picture; its size is that of a README column."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 3.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(curve.rewards), list(curve.rewards.values()), "o-", color=REWARD_COLOUR, label="mean reward")
    if curve.evaluations:
        label = f"share of test problems solved (avg@{curve.samples_per_prompt})"
        points = list(curve.evaluations), list(curve.evaluations.values())
        axes.plot(*points, "D", markersize=8, color=EVALUATION_COLOUR, label=label)
    axes.set(xlabel="episode (0: before training)", ylim=(0, 1), xlim=(-0.5, max(curve.rewards) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Software": None})


def main() -> int:
    """Run the command; 2 for a folder that is no run."""
    parser = argparse.ArgumentParser(description="Draw the learning curve of a run.")
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--output", type=Path, default=PICTURE, help=f"picture to write (default: {PICTURE})")
    arguments = parser.parse_args()
    metrics_file: Path = arguments.run / "metrics.jsonl"
    if not metrics_file.is_file():
        sys.stderr.write(f"{metrics_file} does not exist; give the output_dir of a run\n")
        return 2
    curve = read_curve(metrics_file)
    if not curve.rewards:
        sys.stderr.write(f"{metrics_file} holds no finished episode\n")
        return 2
    draw(curve, arguments.output)
    last = max(curve.rewards)
    print(f"{arguments.output}: {len(curve.rewards)} episodes, last mean reward {curve.rewards[last]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
