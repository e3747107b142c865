"""What all tests share: a quiet, single-threaded environment, and where optional real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chatlearn.config.environment import keep_to_ourselves

# Before torch is imported: tests start several processes on few cores, and threads that spin would starve them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
keep_to_ourselves()


@pytest.fixture(scope="session")
def gsm8k_dir() -> Path:
    """The whole GSM8K as its hub lays it out, where CHATLEARN_GSM8K_DIR names it."""
    folder = os.environ.get("CHATLEARN_GSM8K_DIR")
    if not folder:
        pytest.skip("CHATLEARN_GSM8K_DIR does not name a folder with GSM8K")
    return Path(folder)
