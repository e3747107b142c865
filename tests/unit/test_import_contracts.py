"""Every import contract of pyproject.toml goes red when broken; that all are green, `lint-imports` itself tells."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]

# One import per contract, by the contract's id: the package that must not have it, and the import.
PLANTED = {
    "staircase": ("batch", "import chatlearn.trainer"),
    "no-cycles": ("data", "import chatlearn.reward"),
    "ray-in-cluster": ("rollout", "import ray"),
    "light-configuration": ("config", "import torch"),
    "trainer-without-configuration": ("trainer", "import omegaconf"),
    "pure-mathematics": ("algorithm", "import transformers"),
    "replay-alone": ("replay", "import vllm"),
}
# The way back, which makes a circle of the second row.
RETURN = ("reward", "import chatlearn.data")


def test_every_contract_notices_its_violation(tmp_path: Path) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert {contract["id"] for contract in contracts} == set(PLANTED)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "chatlearn", tmp_path / "chatlearn", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package, line in (*PLANTED.values(), RETURN):
        (tmp_path / "chatlearn" / package / "planted.py").write_text(line + "\n")

    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    broken = set(re.findall(r"^(.+) BROKEN$", done.stdout, re.MULTILINE))
    assert broken == {contract["name"] for contract in contracts}, done.stdout + done.stderr
    assert done.returncode == 1
