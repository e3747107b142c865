"""The documented command, as a person types it: what it prints on a terminal and elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from conversions import Run, loaded, make_run

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def command(run: Run, **changes: str) -> list[str]:
    options = {"hf_dir": run.base, "ckpt_dir": run.checkpoints, "save_dir": run.save_dir, "iter": "7", "groupgemm": "0"}
    words = [word for name, value in (options | changes).items() for word in (f"--{name}", str(value))]
    return [sys.executable, "chatlearn/offline_ckpt_converter.py", *words]


def on_a_terminal(words: list[str]) -> tuple[int, str]:
    """The exit status of a command, and all it writes to a standard error that is a terminal."""
    ours, theirs = pty.openpty()
    terminal = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(words, cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL, env=terminal)
    os.close(theirs)
    said = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # how a terminal says that the other end is closed
            break
        if not block:
            break
        said += block
    os.close(ours)
    return process.wait(), said.decode()


def test_a_bar_is_drawn_on_a_terminal_only(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tied")
    status, said = on_a_terminal(command(run))
    assert status == 0
    assert "loading back" in said
    assert "100%" in said
    assert said.rstrip().endswith("GB)")

    piped = subprocess.run(command(run), cwd=ROOT, capture_output=True, text=True, check=False)
    assert piped.returncode == 0
    assert piped.stdout == ""
    (line,) = piped.stderr.splitlines()
    assert line.startswith(f"iteration 7 of {run.checkpoints} is in {run.save_dir} (")
    assert loaded(run.save_dir).config.vocab_size == 50


@pytest.mark.parametrize("iteration", ["8", "-1", "seven", "", "7.5"])
def test_a_wrong_iteration_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], iteration: str) -> None:
    from chatlearn.cli import main

    run = make_run(tmp_path, "tied")
    capsys.readouterr()
    assert main(["convert", *command(run, iter=iteration)[2:]]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert ("complete ones: 7" if iteration == "8" else "--iter") in said
    assert not run.save_dir.exists()
