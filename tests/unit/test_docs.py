"""The documents: every command in them is run by somebody, every link leads somewhere, every claim of status is true.

A command is one logical line of a fenced ``bash`` block. A new one needs a test that runs it, or a reason why none can.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urldefrag

import pytest

from chatlearn.config.fates import FATE_OF, FATES

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "embedded" / "README.md"])

TUTORIAL = "tests/end_to_end/test_tutorial.py"
TRAINING = "tests/end_to_end/test_training.py"
PREPARE = f"{TUTORIAL}::test_data_preparation_may_be_typed_twice"
PLAN = f"{TUTORIAL}::test_the_8b_training_passes_every_check_before_the_start"
CONVERT = f"{TUTORIAL}::test_the_converter_takes_the_runs_own_base_model_and_says_so"
MIXTURE = f"{TUTORIAL}::test_the_converter_of_a_mixture_of_experts_with_groupgemm"
OWN = f"{TUTORIAL}::test_functions_of_ones_own_are_found_and_keep_the_contract"
LAPTOP = f"{TUTORIAL}::test_the_laptop_plan_needs_no_gpu"
REBUILD = "tests/end_to_end/test_embedded_model.py::test_the_first_steps_of_a_rebuild_agree_with_the_shipped_model"
CHECKS = "scripts/test.sh"
MATH_DIR = "dataset/MATH-lighteval"
CONVERTER = "python chatlearn/offline_ckpt_converter.py --hf_dir ${CHATLEARN}/"
SAVE_8B = "${CHATLEARN}/output/qwen3-grpo-8b/save_model"
SAVE_30B = "${CHATLEARN}/output/qwen3-grpo-30b-a3b/save_model"
REPLAYS = "tests/distributed/test_replay.py"
REPLAY = "chatlearn replay output/mine/capsules/iteration_000003"
WANDB = "runtime_args.log_args_dict"

# Run by the test that is named. A command of the tutorial's test must stand there word for word; of other tests (and of
# scripts/test.sh) the program must be named there: they give it stand-ins or arguments of their own.
RUN_BY = {
    "bash scripts/quickstart.sh": (
        "tests/unit/test_quickstart_script.py::test_it_installs_prepares_trains_and_converts_the_last_checkpoint"
    ),
    "CHATLEARN_TORCH_SOURCE=https://download.pytorch.org/whl/cpu bash scripts/quickstart.sh": (
        "tests/unit/test_install_script.py::test_the_torch_source_is_given_to_pip_for_torch_alone"
    ),
    "bash scripts/install.sh auto": "tests/unit/test_install_script.py::test_the_second_run_installs_nothing",
    "mkdir -p dataset": PREPARE,
    f"python chatlearn/data/data_preprocess/math_lighteval.py --input_dir {MATH_DIR} --local_dir {MATH_DIR}": PREPARE,
    "GPUS_PER_NODE=8 bash scripts/train_fsdp_vllm_qwen3_8b_grpo.sh --dry-run": PLAN,
    "NNODES=8 RANK=0 GPUS_PER_NODE=8 bash scripts/train_fsdp_vllm_qwen3_235b_a22b_grpo.sh --dry-run": (
        "tests/unit/test_scripts.py::test_the_mixtures_of_experts"
    ),
    'export WANDB_API_KEY="Your-Wandb-api-key"': PLAN,
    f"bash scripts/train_fsdp_vllm_qwen3_8b_grpo.sh {WANDB}.enable_wandb=True "
    f'{WANDB}.wandb_project="Your-Wandb-Project-Name"': PLAN,
    "export CHATLEARN=$(pwd)": CONVERT,
    f"{CONVERTER}Qwen3-8B/ --ckpt_dir {SAVE_8B}/policy_trainer --save_dir {SAVE_8B}/huggingface/ "
    "--iter 200 --groupgemm 0": CONVERT,
    f"{CONVERTER}pretrained_models/Qwen3-30B-A3B/ --ckpt_dir {SAVE_30B}/policy_trainer "
    f"--save_dir {SAVE_30B}/huggingface/ --iter 200 --groupgemm 1": MIXTURE,
    "python chatlearn/data/data_preprocess/arithmetic.py --local_dir dataset/arithmetic": LAPTOP,
    "python chatlearn/entrypoint.py grpo --config-file template/quickstart.yaml --dry-run": LAPTOP,
    "python chatlearn/entrypoint.py grpo --config-file template/quickstart.yaml runtime_args.output_dir=output/mine": (
        f"{TRAINING}::test_reward_rises"
    ),
    "PYTHONPATH=. python chatlearn/entrypoint.py grpo --config-file template/quickstart.yaml "
    "models.reward.function=my_extensions:brief_and_right runtime_args.advantage=my_extensions:better_than_worst "
    "models.policy_trainer.loss=my_extensions:halved --dry-run": OWN,
    "PYTHONPATH=. python -m pytest tests/contracts/test_reward_contract.py --plugin=my_extensions:brief_and_right": OWN,
    "python embedded/build.py --output /tmp/tiny_qwen3 --compare embedded/tiny_qwen3": REBUILD,
    "python embedded/build.py --output /tmp/tiny_qwen3_moe --moe --compare embedded/tiny_qwen3_moe": REBUILD,
    "python embedded/measure.py --model /tmp/tiny_qwen3": (
        "tests/end_to_end/test_embedded_model.py::"
        "test_the_shipped_model_solves_about_a_third_and_nearly_all_in_eight_tries"
    ),
    "python -m chatlearn.config.describe --write docs/config.md": f"{TUTORIAL}::test_the_page_of_keys_is_generated",
    "python benchmarks/learning_curve.py output/quickstart-1": (
        "tests/unit/test_docs.py::test_the_picture_is_drawn_from_a_run_and_nothing_else"
    ),
    f"{REPLAY} --compare": f"{REPLAYS}::test_a_planted_fault_is_found_and_named",
    REPLAY: f"{REPLAYS}::test_the_command_prints_one_object_and_needs_neither_ray_nor_an_engine",
    f"torchrun --nproc-per-node 2 -m {REPLAY} models.policy_trainer.ulysses_sequence_parallel_size=2": (
        f"{TRAINING}::test_a_run_joins_a_ray_cluster_and_leaves_it_running"
    ),
    "chatlearn resume-check -c template/quickstart.yaml --episodes 3 --cut 1": (
        "tests/end_to_end/test_resume_exact.py::test_the_command_proves_it_on_a_configuration_of_ones_own"
    ),
    "ruff check .": CHECKS,
    "ruff format .": CHECKS,
    "lint-imports": CHECKS,
    "basedpyright": CHECKS,
    "python -m pytest tests/unit": CHECKS,
}

HUB = "asks a model hub"
DOCKER = "needs Docker; tests/unit/test_install_script.py reads the files"
GPUS = "needs 8 GPUs; its --dry-run is tested"
NODES = "needs several nodes; the plan of 8 nodes is tested"
NOT_RUN = {
    "bash scripts/test.sh": "is what runs the tests; continuous integration calls it",
    "git clone https://github.com/alibaba/ChatLearn.git && cd ChatLearn": "asks the network for what is here already",
    "docker build -f docker/Dockerfile.cuda -t chatlearn:cuda .": DOCKER,
    'docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD":/data chatlearn:cuda': DOCKER,
    "docker build -f docker/Dockerfile.cpu -t chatlearn:cpu .": DOCKER,
    "docker run --rm -it --shm-size=2g chatlearn:cpu bash scripts/quickstart.sh": DOCKER,
    "source .venv/bin/activate": "changes the shell; the tests run in that environment",
    "pip install modelscope": "installs an optional package from the index",
    f"modelscope download --dataset AI-ModelScope/MATH-lighteval --local_dir {MATH_DIR}": HUB,
    "modelscope download --model Qwen/Qwen3-8B --local_dir pretrained_models/Qwen3-8B": HUB,
    "modelscope download --model Qwen/Qwen3-30B-A3B --local_dir pretrained_models/Qwen3-30B-A3B": HUB,
    "modelscope download --model Qwen/Qwen3-235B-A22B --local_dir pretrained_models/Qwen3-235B-A22B": HUB,
    "bash scripts/train_fsdp_vllm_qwen3_8b_grpo.sh": GPUS,
    "bash scripts/train_fsdp_vllm_qwen3_30b_a3b_grpo.sh": GPUS,
    "export NNODES=2 MASTER_ADDR=10.0.0.1 RAY_AUTH_TOKEN=one-long-random-word-for-all-nodes": NODES,
    "RANK=0 bash scripts/train_fsdp_vllm_qwen3_8b_grpo.sh": NODES,
    "RANK=1 bash scripts/train_fsdp_vllm_qwen3_8b_grpo.sh": NODES,
    "python benchmarks/embedded_model.py": "rebuilds both models in full, which takes minutes; 40 steps are tested",
    "python requirements/lock.py": "resolves on the package index; tests/unit/test_locks.py checks its result",
}


def one_line(text: str) -> str:
    """Continued lines joined, and every run of white space one space."""
    return " ".join(text.replace("\\\n", " ").split())


def commands_in(document: str) -> Iterator[str]:
    """The commands of all fenced ``bash`` blocks, without comments."""
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = one_line(re.sub(r"(^|\s)#.*", "", line))
            if command:
                yield command


def documented() -> set[str]:
    return {command for document in DOCUMENTS for command in commands_in(document.read_text())}


def program_of(command: str) -> str:
    """The file or tool that a command runs, by its last name: a script, a module's file, or a bare tool."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"\w+=\S*", word)]
    words = words[1:] if words[0] in ("bash", "python") else words
    return Path(words[1] if words[0] == "-m" else words[0]).name


def test_commands_are_read_as_a_shell_reads_them() -> None:
    text = "```bash\n# a comment\nrun \\\n  --this  1 # why\n\nFOO=bar bash scripts/go.sh\n```\n```text\nnot one\n```\n"
    assert list(commands_in(text)) == ["run --this 1", "FOO=bar bash scripts/go.sh"]
    assert program_of("FOO=bar bash scripts/go.sh key=1") == "go.sh"
    assert program_of("python -m pytest tests/unit") == "pytest"


def test_every_command_is_run_by_a_test_or_has_a_reason() -> None:
    nobody = documented() - set(RUN_BY) - set(NOT_RUN)
    assert not nobody, "commands in the documents that nobody runs; add a test and a row in RUN_BY"
    assert not (set(RUN_BY) | set(NOT_RUN)) - documented(), "rows about commands that no document has any more"
    assert not set(RUN_BY) & set(NOT_RUN)


@pytest.mark.parametrize("command", RUN_BY)
def test_the_test_that_is_named_exists_and_runs_the_command(command: str) -> None:
    name, _, function = RUN_BY[command].partition("::")
    source = (ROOT / name).read_text()
    if function:
        functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        assert function in functions
    if name == TUTORIAL:
        assert command in one_line(source)
    elif name == TRAINING:
        assert program_of(command) in source + (ROOT / "tests" / "end_to_end" / "runs.py").read_text()
    elif "CHATLEARN_TORCH_SOURCE" in command:
        assert "CHATLEARN_TORCH_SOURCE" in source
    else:
        assert program_of(command) in source


def test_the_map_shows_the_staircase_that_is_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (staircase,) = (contract["layers"] for contract in contracts if contract["id"] == "staircase")
    block = (ROOT / "docs" / "map.md").read_text().partition("```text\n")[2].partition("```")[0]
    assert [re.split(r"\s{2,}", line)[0] for line in block.splitlines()] == staircase


def anchors(document: Path) -> set[str]:
    """The anchors that a forge makes of headings."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, anchor = urldefrag(link)
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


def test_files_that_documents_name_exist() -> None:
    """A path in back-quotes of the project, or of the package as docs/map.md writes it."""
    folders = (ROOT, ROOT / "chatlearn", ROOT / "docs")
    gone = [
        f"{document.name}: {name}"
        for document in DOCUMENTS
        if document.name != "config.md"  # it speaks of other people's files
        for name in re.findall(r"`([\w./-]+/[\w./-]+\.(?:py|sh|md|yaml|txt)|[\w/-]+\.py)`", document.read_text())
        if not any((folder / name).exists() for folder in (*folders, document.parent))
    ]
    assert gone == []


def refused_in_status() -> set[str]:
    section = (ROOT / "docs" / "status.md").read_text().partition("## What this version does not do")[2]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def test_what_the_status_page_calls_refused_is_refused() -> None:
    keys = refused_in_status()
    for key in keys:
        name, _, value = key.partition("=")
        fate = FATE_OF[name]
        assert fate.kind == "refused" or value in fate.unsupported, key


def test_what_is_not_supported_yet_stands_on_the_status_page() -> None:
    keys = {row.key for row in FATES if row.kind == "refused" and "not supported" in row.reason}
    values = {f"{row.key}={value}" for row in FATES for value in row.unsupported}
    assert (keys | values) - refused_in_status() == set()


def test_keys_that_documents_name_are_known() -> None:
    unknown: list[str] = []
    for document in DOCUMENTS:
        found = re.findall(r"\b((?:runtime_args|models)\.[\w.]*\w)", document.read_text())
        unknown += [
            f"{document.name}: {key}"
            for key in found
            if key not in FATE_OF and not any(known.startswith(f"{key}.") for known in FATE_OF)
        ]
    assert unknown == []


def test_the_picture_is_drawn_from_a_run_and_nothing_else(tmp_path: Path) -> None:
    """``benchmarks/learning_curve.py`` on a run's numbers, on one without any, and on a folder that is no run."""

    def draw(run: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "benchmarks/learning_curve.py", str(run), "--output", str(tmp_path / "curve.png")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert draw(tmp_path).returncode == 2
    lines: list[dict[str, float]] = [
        {"step": 0, "eval/mine/avg@2": 0.25},
        *({"step": step, "rollout/reward_mean": step / 10} for step in (1, 2, 3)),
        {"step": 3, "time/save": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    assert draw(tmp_path).returncode == 2
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = draw(tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "3 episodes, last mean reward 0.300" in drawn.stdout
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
