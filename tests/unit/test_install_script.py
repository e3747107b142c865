"""``scripts/install.sh`` with a Python that pretends to install: run twice, broken off, refused; and the images."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands for the network: notes every pip command; the file `offline` makes the next one fail, `no-torch` hides torch.
PRETENDING_PYTHON = """\
#!/usr/bin/env bash
if [[ $* == "--version" ]]; then echo "Python 3.12.0"; fi
if [[ $* == "-m venv"* ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
if [[ $* == "-m pip"* ]]; then
    echo "$*" >>pip_commands
    if [[ -e no-torch && $* == *torch_cpu.txt* ]]; then
        echo "ERROR: No matching distribution found for torch==2.13.0+cpu" >&2
        exit 1
    fi
    [[ ! -e offline ]] || exit 1
fi
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout with nothing but what the script reads, and the pretending Python next to it."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    python = tmp_path / "python"
    python.write_text(PRETENDING_PYTHON)
    python.chmod(0o755)
    return tmp_path


def install(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "CHATLEARN_PYTHON": str(project / "python"), **variables}
    command = ["bash", "scripts/install.sh", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def pip_commands(project: Path) -> list[str]:
    path = project / "pip_commands"
    commands = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return commands


def test_the_second_run_installs_nothing(project: Path) -> None:
    first = install(project, "cpu", "--dev")
    assert first.returncode == 0, first.stderr
    assert [command.split("-r ")[-1] for command in pip_commands(project)[:3]] == [
        "requirements/torch_cpu.txt",
        "requirements/cpu.txt",
        "requirements/dev.txt",
    ]
    for arguments in (("cpu", "--dev"), ("cpu",)):
        again = install(project, *arguments)
        assert (again.returncode, pip_commands(project)) == (0, [])
        assert "nothing to install" in again.stdout


def test_development_tools_come_on_top(project: Path) -> None:
    install(project, "cpu")
    pip_commands(project)
    assert install(project, "cpu", "--dev").returncode == 0
    assert [command.split("-r ")[-1] for command in pip_commands(project)] == ["requirements/dev.txt"]


def test_everything_is_installed_by_hash_and_without_resolving(project: Path) -> None:
    install(project, "cuda", "--dev")
    *locked, own = pip_commands(project)
    assert len(locked) == 2
    for command in locked:
        assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command.split())
    assert {"--no-deps", "--no-build-isolation", "-e"} <= set(own.split())


def test_an_installation_that_broke_off_is_not_taken_for_complete(project: Path) -> None:
    (project / "offline").touch()
    assert install(project, "cpu").returncode == 1
    (project / "offline").unlink()
    (project / ".venv" / "half").touch()
    again = install(project, "cpu")
    assert again.returncode == 0
    assert "starting afresh" in again.stdout
    assert not (project / ".venv" / "half").exists()


@pytest.mark.parametrize("changed", ["requirements/cpu.txt", "requirements/torch_cpu.txt"])
def test_changed_pins_are_installed_into_a_new_environment(project: Path, changed: str) -> None:
    install(project, "cpu")
    (project / ".venv" / "left_over").touch()
    (project / changed).write_text((project / changed).read_text() + "# changed\n")
    assert install(project, "cpu").returncode == 0
    assert not (project / ".venv" / "left_over").exists()


def test_a_changed_pyproject_installs_the_project_alone(project: Path) -> None:
    install(project, "cpu")
    pip_commands(project)
    (project / "pyproject.toml").write_text((project / "pyproject.toml").read_text() + "# changed\n")
    assert install(project, "cpu").returncode == 0
    (command,) = pip_commands(project)
    assert command.endswith("-e .")


def test_a_missing_torch_build_names_its_cure(project: Path) -> None:
    (project / "no-torch").touch()
    refused = install(project, "cpu")
    assert refused.returncode == 1
    assert "CHATLEARN_TORCH_SOURCE=https://" in refused.stderr


@pytest.mark.parametrize(
    ("source", "option"), [("https://example.org/cpu", "--extra-index-url"), (".", "--find-links")]
)
def test_the_torch_source_is_given_to_pip_for_torch_alone(project: Path, source: str, option: str) -> None:
    assert install(project, "cpu", CHATLEARN_TORCH_SOURCE=source).returncode == 0
    torch, *others = pip_commands(project)
    assert f"{option} {source}" in torch
    assert not any(source in command.split() for command in others if not command.endswith("-e ."))


def test_an_old_python_is_refused_with_what_to_do(project: Path) -> None:
    refused = install(project, "cpu", CHATLEARN_PYTHON="/bin/false")
    assert refused.returncode == 1
    assert "3.11" in refused.stderr
    assert "python3-venv" in refused.stderr


def test_somebody_elses_environment_is_left_alone(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv" / "mine").touch()
    refused = install(project, "cpu")
    assert refused.returncode == 1
    assert "move it away" in refused.stderr
    assert (project / ".venv" / "mine").exists()


@pytest.mark.parametrize("arguments", [(), ("gpu",), ("cpu", "--development"), ("cpu", "--dev", "more")])
def test_a_wrong_command_shows_the_usage(project: Path, arguments: tuple[str, ...]) -> None:
    refused = install(project, *arguments)
    assert refused.returncode == 2
    assert "bash scripts/install.sh {cpu|cuda|auto} [--dev]" in refused.stderr


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_image_installs_as_everybody_does(kind: str) -> None:
    text = (ROOT / "docker" / f"Dockerfile.{kind}").read_text()
    assert f"\nRUN bash scripts/install.sh {kind}\n" in text
    assert text.index("COPY . .") < text.index("RUN bash scripts/install.sh")
    assert ".venv" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_image_has_the_cuda_of_the_wheels() -> None:
    image = (ROOT / "docker" / "Dockerfile.cuda").read_text().split("FROM nvidia/cuda:")[1].split(".")[:2]
    toolkit = (ROOT / "requirements" / "cuda.txt").read_text().split("\ncuda-toolkit==")[1].split(".")[:2]
    assert image == toolkit
