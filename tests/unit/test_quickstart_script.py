"""``scripts/quickstart.sh`` with steps that only note how they were called: order, numbers, arguments, failures."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands for time: every step notes its command; training leaves checkpoints; the file `broken` makes it fail.
PRETENDING_PYTHON = """\
#!/usr/bin/env bash
echo "$*" >>commands
if [[ $1 == chatlearn/entrypoint.py ]]; then
    [[ ! -e broken ]] || exit 130
    for argument in "$@"; do
        [[ $argument != runtime_args.output_dir=* ]] || out=${argument#*=}
    done
    mkdir -p "$out"/save_model/policy_trainer/{9,15,huggingface}
fi
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "install.sh").write_text('echo "install $*" >>commands\n')
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PRETENDING_PYTHON)
    python.chmod(0o755)
    return tmp_path


def quickstart(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "scripts/quickstart.sh", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def commands(project: Path) -> list[str]:
    return (project / "commands").read_text().splitlines()


def test_it_installs_prepares_trains_and_converts_the_last_checkpoint(project: Path) -> None:
    done = quickstart(project, "runtime_args.num_episode=3")
    assert done.returncode == 0, done.stderr
    install, prepare, train, convert = commands(project)
    assert install == "install auto"
    assert prepare == "chatlearn/data/data_preprocess/arithmetic.py --local_dir dataset/arithmetic"
    assert train == (
        "chatlearn/entrypoint.py grpo --config-file template/quickstart.yaml "
        "runtime_args.output_dir=output/quickstart-1 runtime_args.num_episode=3"
    )
    assert "--ckpt_dir output/quickstart-1/save_model/policy_trainer" in convert
    assert "--iter 15 " in convert
    assert "output/quickstart-1/metrics.jsonl" in done.stdout


def test_every_run_gets_a_folder_of_its_own(project: Path) -> None:
    for _ in range(3):
        assert quickstart(project).returncode == 0
    assert sorted(path.name for path in (project / "output").iterdir()) == [f"quickstart-{n}" for n in (1, 2, 3)]


def test_a_folder_that_the_user_names_is_used(project: Path) -> None:
    assert quickstart(project, "runtime_args.output_dir=runs/mine").returncode == 0
    assert "--save_dir runs/mine/save_model/huggingface" in commands(project)[-1]


def test_a_failure_stops_it_with_its_status(project: Path) -> None:
    (project / "broken").touch()
    assert quickstart(project).returncode == 130
    assert len(commands(project)) == 3


def test_what_is_no_override_is_refused_before_anything_starts(project: Path) -> None:
    refused = quickstart(project, "--dry-run")
    assert refused.returncode == 2
    assert "key=value" in refused.stderr
    assert not (project / "commands").exists()
