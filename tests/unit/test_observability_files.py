"""Files that describe a run: whole or not there, and true."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from chatlearn.observability.actors import Actor, ActorsFile
from chatlearn.observability.manifest import RunFacts, git_commit, package_versions, write_manifest
from chatlearn.observability.whole_file import replacing


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep/file.json"
    with replacing(path) as file:
        file.write("old")
    with replacing(path) as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_an_error_leaves_the_old_file_and_no_scraps(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_actors_say_who_and_where(tmp_path: Path) -> None:
    actors = ActorsFile(tmp_path / "actors.json")
    actors.write([Actor("policy", 0, "host-a", 12, "starting")])
    actors.write([Actor("policy", 0, "host-a", 12, "running"), Actor("policy_trainer", 1, "host-b", 13, "running")])
    document = json.loads((tmp_path / "actors.json").read_text())
    assert document["actors"] == [
        {"role": "policy", "rank": 0, "host": "host-a", "pid": 12, "state": "running"},
        {"role": "policy_trainer", "rank": 1, "host": "host-b", "pid": 13, "state": "running"},
    ]


def test_the_manifest_says_what_a_run_was_made_of(tmp_path: Path) -> None:
    data = tmp_path / "train.json"
    data.write_bytes(b'{"a": 1}\n')
    path = write_manifest(tmp_path / "run", RunFacts(tmp_path / "model", (data,), ("2 x NVIDIA H200",)))
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert document["model_path"] == str(tmp_path / "model")
    assert document["data"] == [
        {"path": str(data), "num_bytes": 9, "sha256": hashlib.sha256(b'{"a": 1}\n').hexdigest()}
    ]
    assert document["devices"] == ["2 x NVIDIA H200"]
    assert document["versions"]["torch"] == metadata.version("torch")
    assert document["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert document["host"]["num_cpus"] == os.cpu_count()
    assert document["command"] == sys.orig_argv


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert package_versions(["numpy", "no-such-package-at-all"]) == {"numpy": metadata.version("numpy")}


def run_git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    finished = subprocess.run(
        ["git", *identity, "-C", str(directory), *arguments], check=True, capture_output=True, text=True
    )
    return finished.stdout.strip()


def test_the_commit_is_that_of_the_checkout_itself(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("1")
    run_git(tmp_path, "init", "-q")
    run_git(tmp_path, "add", "file")
    run_git(tmp_path, "commit", "-q", "-m", "one")
    commit = run_git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    assert git_commit(tmp_path / "inside") is None
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"
