"""Whole runs of the real command, as a user starts them: real Ray, real engine, real ranks, a tiny real model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, Launcher


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json and test.json."""
    folder = tmp_path_factory.mktemp("arithmetic")
    program = "chatlearn/data/data_preprocess/arithmetic.py"
    sizes = ["--train_size", "600", "--test_size", "40"]
    command = [sys.executable, program, "--local_dir", str(folder), *sizes]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def launcher(arithmetic: Path) -> Launcher:
    """Starts runs on the quickstart's configuration, with a small data set and few answers."""
    return Launcher(arithmetic)
