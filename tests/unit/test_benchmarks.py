"""Benchmarks rehearse with tiny sizes; those for GPUs, and the tests beside them, where little more than torch is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What a GPU machine may lack: everything but torch, transformers, safetensors, numpy and what they need; and pytest.
ABSENT = ["ray", "vllm", "pydantic", "omegaconf", "typer", "rich", "peft", "trl", "datasets", "psutil", "hypothesis"]

PROGRAM = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))  # None there makes an import fail
for path in sys.argv[1].split():
    runpy.run_path(path)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def rehearse(benchmark: list[str], tests: list[Path]) -> str:
    """What the benchmark prints, with ``tests`` imported before it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, " ".join(map(str, tests)), *benchmark],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_trainers_benchmark_rehearses_on_a_cpu_without_the_libraries_of_a_whole_installation() -> None:
    tests = [ROOT / "tests" / "conftest.py", *sorted((ROOT / "tests" / "gpu").glob("*.py"))]
    options = {"--device": "cpu", "--steps": "1", "--tokens": "64", "--micro-batches": "2"}
    benchmark = ["benchmarks/gpu/trainer.py", "--tiny", *(word for pair in options.items() for word in pair)]
    printed = rehearse(benchmark, tests)
    rows = re.findall(r"^\| (tiny\S*) \| 64 \| (\S+) \| ([\d,]+) \|", printed, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [
        (shape, way) for shape in ("tiny", "tiny-moe") for way in ("full", "selective")
    ]
    assert all(int(tokens_per_s.replace(",", "")) > 0 for _, _, tokens_per_s in rows)
    assert "6 x N_active x tokens" in printed


def test_the_benchmark_of_the_transfer_rehearses_too_and_sees_a_damaged_byte() -> None:
    printed = rehearse(
        ["benchmarks/gpu/transfer.py", "--device", "cpu", "--tiny", "--shapes", "tiny-moe", "--transfers", "1"], []
    )
    ((seconds, speed),) = re.findall(
        r"^\| tiny-moe \| 69 \| 0\.001 \| 1 \| ([\d.]+) \| ([\d.]+) \|", printed, flags=re.MULTILINE
    )
    assert float(seconds) > 0
    assert float(speed) > 0
    assert re.search(r"^- tiny-moe: model\.\S+: the bytes that arrived are not", printed, flags=re.MULTILINE)


@pytest.mark.long
def test_the_benchmark_of_checkpoints_rehearses(tmp_path: Path) -> None:
    options = ["--tiny", "--folder", str(tmp_path), "--results", str(tmp_path / "checkpoint.md")]
    command = [sys.executable, "benchmarks/checkpoint.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint.md").read_text() == done.stdout
    standstill, conversion = done.stdout.split("## Conversion")
    saves = re.findall(r"^\| \d \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", standstill, flags=re.MULTILINE)
    assert len(saves) == 2
    assert all(0 < float(standing_s) <= float(written_s) + 0.01 for _, standing_s, written_s in saves)
    ((copy_s, conversion_s, peak_gb),) = re.findall(
        r"^\| 1 \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", conversion, flags=re.MULTILINE
    )
    assert float(copy_s) >= 0
    assert float(conversion_s) > 0
    assert float(peak_gb) < 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.md"]
