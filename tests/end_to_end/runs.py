"""Starting runs, watching them, and reading what they leave."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 240.0
RUN_TIMEOUT_S = 400.0


@dataclass(frozen=True)
class Launcher:
    """Starts ``chatlearn grpo`` on the quickstart's template, with some variables in its environment."""

    data: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, output: Path, *overrides: str) -> list[str]:
        """The command line of a small run."""
        return [
            sys.executable,
            "chatlearn/entrypoint.py",
            "grpo",
            "--config-file",
            "template/quickstart.yaml",
            f"runtime_args.data_path={self.data / 'train.json'}",
            f"runtime_args.eval_data_path={self.data / 'test.json'}",
            f"runtime_args.output_dir={output}",
            *overrides,
        ]

    def start(self, output: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
        """Start a run and return at once."""
        return subprocess.Popen(
            self.command(output, *overrides),
            cwd=ROOT,
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, output: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Start a run and wait for its end."""
        process = self.start(output, *overrides, **environment)
        return finish(process)


class RayHead:
    """A Ray cluster of somebody else's, on this machine; ended by its process and nothing else.

    ``invitation`` are the variables with which a run joins it. It has more CPUs than the machine, since what is tried
    on it mostly waits.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._token = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_MODE": "token"}
        self.invitation: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RayHead:
        # Ray gives itself 30 s to start, which is not to be changed and on a busy machine not always enough.
        assert any(self._starts(log) for log in ("first.log", "second.log", "third.log")), self._folder
        return self

    def is_running(self) -> bool:
        """Whether it still serves."""
        return self._process is not None and self._process.poll() is None

    def __exit__(self, *_: object) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        family = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        self._process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()
        self._process.wait()

    def _starts(self, log: str) -> bool:
        address = f"127.0.0.1:{free_port()}"
        self.invitation = {"RAY_ADDRESS": address, **self._token}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=8"]
        command += ["--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}", "--include-dashboard=false"]
        with (self._folder / log).open("w") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **self._token, "RAY_prestart_worker_first_driver": "0"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        while self.is_running():
            if "Ray runtime started" in (self._folder / log).read_text():
                return True
            time.sleep(0.3)
        return False


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a run and collect what it said; one that takes too long is killed, and stays with nobody."""
    try:
        output, errors = process.communicate(timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def metrics(output: Path) -> dict[int, dict[str, float]]:
    """The numbers of every step."""
    steps: dict[int, dict[str, float]] = {}
    path = output / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        numbers: dict[str, Any] = json.loads(line)
        steps.setdefault(numbers["step"], {}).update(numbers)
    return steps


def actors(output: Path) -> list[dict[str, Any]]:
    """Who takes part."""
    rows: list[dict[str, Any]] = json.loads((output / "actors.json").read_text())["actors"]
    return rows


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Wait for something a run does; fails with its messages when it ends before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert process.poll() is None, f"the run ended before {what}: {process.communicate()[1]}"
        assert time.monotonic() < deadline, f"no {what} within {START_TIMEOUT_S} s"
        time.sleep(0.2)


def trained(output: Path, episode: int) -> Callable[[], bool]:
    """Whether the numbers of ``episode`` are on disk."""
    return lambda: episode in metrics(output)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process below a run, Ray's included."""
    return psutil.Process(process.pid).children(recursive=True)


def survivors(processes: list[psutil.Process], after_s: float) -> list[str]:
    """Command lines of those that live ``after_s`` seconds from now."""
    _, alive = psutil.wait_procs(processes, timeout=after_s)
    return [" ".join(process.cmdline()) for process in alive if process.status() != psutil.STATUS_ZOMBIE]
