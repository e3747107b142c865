"""What checkpoints cost: python benchmarks/checkpoint.py

Runs every part (``benchmarks/checkpoints``) and writes benchmarks/results/checkpoint.md. Needs about 10 GB on the disk
below ``--folder``, or in a temporary folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import tempfile

from benchmarks.checkpoints import conversion, standstill

RESULTS = Path(__file__).parent / "results" / "checkpoint.md"
# A part is given an empty folder, and whether to rehearse with a tiny model, when it keeps no bounds.
PARTS = {"standstill": standstill.measure, "conversion": conversion.measure}


def main() -> int:
    """Measure the parts one after the other; the exit status is 1 where one of them broke its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    parser.add_argument("--folder", type=Path, help="an existing folder on the disk to measure")
    parser.add_argument("--tiny", action="store_true", help="rehearse")
    asked = parser.parse_args()
    lines, passed = ["# What checkpoints cost", "", "`python benchmarks/checkpoint.py`"], True
    for name, measure in PARTS.items():
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=asked.folder) as folder:
            part = measure(Path(folder), tiny=asked.tiny)
        lines += ["", f"## {part.title}", "", *part.lines]
        passed = passed and part.passed
    asked.results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
