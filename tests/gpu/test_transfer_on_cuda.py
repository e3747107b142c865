"""Weights between two processes over CUDA IPC, and the checksums of the device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatlearn.weights.checksum import BLOCK_BYTES, checksums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).parents[2]


def test_checksums_are_those_of_the_host() -> None:
    memory = torch.randint(0, 256, (300 * BLOCK_BYTES,), dtype=torch.uint8)
    borders = [(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES - block) for block in range(300)]
    assert checksums(memory.cuda(), borders) == checksums(memory, borders)


def test_weights_arrive_and_a_damaged_one_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/transfer.py", "--tiny", "--transfers", "3"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| tiny(?:-moe)? \|", done.stdout, flags=re.MULTILINE)) == 2
    assert len(re.findall(r"^- tiny\S*: model\.\S+: the bytes that arrived", done.stdout, flags=re.MULTILINE)) == 2
