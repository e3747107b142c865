"""Whole runs of the real command, as a user starts them: real Ray, real engine, real ranks, a tiny real model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT, Launcher, RayHead


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


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A Ray cluster that many runs join, one after the other."""
    with RayHead(tmp_path_factory.mktemp("ray")) as head:
        yield head


@pytest.fixture(scope="session")
def guests(arithmetic: Path, ray_head: RayHead) -> Launcher:
    """Starts runs that join one Ray cluster, where what is tried with them has nothing to do with that."""
    return Launcher(arithmetic, ray_head.invitation)
