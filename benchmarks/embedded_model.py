"""Rebuilds both embedded models in full, compares them with the shipped ones and measures all four.

``python benchmarks/embedded_model.py`` takes about ten minutes on one core and prints a table. The exit status is 1
where a rebuilt model is neither equal (same kind of machine) nor equally good (another kind).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tempfile

from embedded.build import BuildRecord, build, differences, read_record
from embedded.measure import PassRates, pass_rates
from embedded.warm_up import FULL_STEPS

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"
SHIPPED = {"dense": EMBEDDED / "tiny_qwen3", "moe": EMBEDDED / "tiny_qwen3_moe"}
NUM_PROMPTS = 200
NUM_ANSWERS = 8
# Two measurements of equally good models differ by less: 0.012 is one standard error of 1600 answers.
RATE_TOLERANCE = 0.08


def main() -> int:
    """Print a row for each model, then what is wrong."""
    rows: list[str] = []
    found: list[str] = []
    for name, shipped_dir in SHIPPED.items():
        shipped = read_record(shipped_dir)
        with tempfile.TemporaryDirectory() as folder:
            rebuilt = build(Path(folder), moe=name == "moe", seed=shipped.seed, num_steps=FULL_STEPS)
            rebuilt_rates = pass_rates(Path(folder), NUM_PROMPTS, NUM_ANSWERS, seed=0)
        shipped_rates = pass_rates(shipped_dir, NUM_PROMPTS, NUM_ANSWERS, seed=0)
        rows += [_row(f"{name}, shipped", shipped, shipped_rates), _row(f"{name}, rebuilt", rebuilt, rebuilt_rates)]
        found += [f"{name}: {difference}" for difference in differences(rebuilt, shipped)]
        if abs(rebuilt_rates.pass_at_1 - shipped_rates.pass_at_1) > RATE_TOLERANCE:
            found.append(f"{name}: pass@1 {rebuilt_rates.pass_at_1:.3f}, shipped {shipped_rates.pass_at_1:.3f}")
    print(
        f"| model | parameters | CPU s | loss | pass@1 | pass@{NUM_ANSWERS} | tokens per answer | truncated | weights |"
    )
    print("| --- " * 9 + "|")
    print("\n".join([*rows, *found]))
    return 1 if found else 0


def _row(name: str, record: BuildRecord, rates: PassRates) -> str:
    last = record.milestones[-1]
    cells = [
        name,
        f"{record.num_parameters:,}",
        f"{record.cpu_seconds:.0f}",
        f"{last.loss:.4f}",
        f"{rates.pass_at_1:.3f}",
        f"{rates.pass_at_k:.3f}",
        f"{rates.mean_tokens:.1f}",
        f"{rates.truncated:.4f}",
        last.weights_sha256[:12],
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
