"""The commands of the documents as printed, in a copy of the project with small stand-ins at the documented paths.

What needs a model hub, 8 GPUs, Docker or an account is not here; ``tests/unit/test_docs.py`` keeps the account of that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import Manifest
from chatlearn.checkpoint.sharded import save_shards
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.parallel import ParallelPlan, Rendezvous, close_process_group, open_process_group
from chatlearn.trainer.sharded_model import ShardedModel

PREPARE = """
mkdir -p dataset
python chatlearn/data/data_preprocess/math_lighteval.py --input_dir dataset/MATH-lighteval \
    --local_dir dataset/MATH-lighteval
"""
PLAN_8B = "GPUS_PER_NODE=8 bash scripts/train_fsdp_vllm_qwen3_8b_grpo.sh --dry-run"
WANDB_KEY = 'export WANDB_API_KEY="Your-Wandb-api-key"'
WANDB_8B = """
bash scripts/train_fsdp_vllm_qwen3_8b_grpo.sh runtime_args.log_args_dict.enable_wandb=True \
    runtime_args.log_args_dict.wandb_project="Your-Wandb-Project-Name"
"""
HERE = "export CHATLEARN=$(pwd)"
CONVERT_8B = r"""
python chatlearn/offline_ckpt_converter.py \
    --hf_dir ${CHATLEARN}/Qwen3-8B/ \
    --ckpt_dir ${CHATLEARN}/output/qwen3-grpo-8b/save_model/policy_trainer \
    --save_dir ${CHATLEARN}/output/qwen3-grpo-8b/save_model/huggingface/ \
    --iter 200 \
    --groupgemm 0
"""
CONVERT_30B = r"""
python chatlearn/offline_ckpt_converter.py \
    --hf_dir ${CHATLEARN}/pretrained_models/Qwen3-30B-A3B/ \
    --ckpt_dir ${CHATLEARN}/output/qwen3-grpo-30b-a3b/save_model/policy_trainer \
    --save_dir ${CHATLEARN}/output/qwen3-grpo-30b-a3b/save_model/huggingface/ \
    --iter 200 \
    --groupgemm 1
"""
ARITHMETIC = "python chatlearn/data/data_preprocess/arithmetic.py --local_dir dataset/arithmetic"
LAPTOP_PLAN = "python chatlearn/entrypoint.py grpo --config-file template/quickstart.yaml --dry-run"
OWN_FUNCTIONS = """
PYTHONPATH=. python chatlearn/entrypoint.py grpo --config-file template/quickstart.yaml \
    models.reward.function=my_extensions:brief_and_right runtime_args.advantage=my_extensions:better_than_worst \
    models.policy_trainer.loss=my_extensions:halved --dry-run
"""
OWN_CONTRACT = """
PYTHONPATH=. python -m pytest tests/contracts/test_reward_contract.py --plugin=my_extensions:brief_and_right
"""
GENERATE_CONFIG_PAGE = "python -m chatlearn.config.describe --write docs/config.md"

# Parts of the machine's environment that a shell has anyway; nothing of ours.
KEPT_VARIABLES = ("HOME", "LANG", "OMP_NUM_THREADS")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project where the user works: with tiny models under the names of large ones, and ``python`` on the path."""
    folder = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("chatlearn", "scripts", "template", "embedded", "docs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "embedded" / "tiny_qwen3", folder / "pretrained_models" / "Qwen3-8B")
    shutil.copytree(ROOT / "embedded" / "tiny_qwen3_moe", folder / "pretrained_models" / "Qwen3-30B-A3B")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only rank of a model, over Gloo, as the trainer of a run on one process is."""
    meeting = tmp_path_factory.mktemp("meeting") / "place"
    open_process_group(0, 1, Rendezvous(f"file://{meeting}", "cpu"))
    yield
    close_process_group()


def shell(project: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """Type ``commands`` one after the other in the project's folder; the first that fails ends it."""
    inherited = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands)],
        env={**inherited, "PATH": f"{project / 'bin'}:/usr/bin:/bin"},
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )


def data_files(project: Path) -> dict[str, str]:
    folder = project / "dataset" / "MATH-lighteval"
    return {name: (folder / f"{name}.json").read_text() for name in ("train", "test")}


@pytest.fixture(scope="module")
def prepared(project: Path) -> Path:
    """The data as its hub lays it out, parquet in a sub-folder, and then what the tutorial types."""
    import pyarrow
    import pyarrow.parquet

    raw = project / "dataset" / "MATH-lighteval" / "data"
    raw.mkdir(parents=True)
    for split, count in (("train", 4), ("test", 2)):
        rows = [
            {
                "problem": f"What is ${n}+{n}$?",
                "level": "Level 1",
                "type": "Algebra",
                "solution": rf"$\boxed{{{2 * n}}}$",
            }
            for n in range(count)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), raw / f"{split}-00000-of-00001.parquet")
    done = shell(project, PREPARE)
    assert done.returncode == 0, done.stderr
    return project


def test_data_preparation_may_be_typed_twice(prepared: Path) -> None:
    first = data_files(prepared)
    answers = [json.loads(line)["reward_model"]["ground_truth"] for line in first["train"].splitlines()]
    assert answers == ["0", "2", "4", "6"]
    assert len(first["test"].splitlines()) == 2
    again = shell(prepared, PREPARE)
    assert again.returncode == 0, again.stderr
    assert data_files(prepared) == first


def test_the_8b_training_passes_every_check_before_the_start(prepared: Path) -> None:
    """With a real (small) model directory, not only with empty files; and with the keys for wandb."""
    plain = shell(prepared, PLAN_8B)
    assert plain.returncode == 0, plain.stderr
    assert "8 GPUs" in plain.stderr
    assert "enable_wandb: false" in plain.stdout
    traced = shell(prepared, WANDB_KEY, "export GPUS_PER_NODE=8", f"{WANDB_8B.rstrip()} --dry-run")
    assert traced.returncode == 0, traced.stderr
    assert "enable_wandb: true" in traced.stdout
    assert "wandb_project: Your-Wandb-Project-Name" in traced.stdout
    assert not (prepared / "output").exists()


def save_trained(project: Path, model_name: str, run: str, *, groupgemm: bool) -> ShardedModel:
    """What a finished run leaves: a sharded checkpoint of iteration 200, whose weights are not the base model's."""
    base = project / "pretrained_models" / model_name
    spec = ModelSpec(base, grouped_experts=groupgemm)
    model = ShardedModel.load(spec, ParallelPlan(num_ranks=1, fsdp_size=1), trainable=True)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.25)
    root = project / "output" / run / "save_model" / "policy_trainer"
    files = save_shards(begin(root, 200), model.module, torch.optim.AdamW(model.module.parameters()))
    publish(root, Manifest(200, 200, str(base), model.family.architecture, groupgemm, num_ranks=1, files=files))
    return model


def require_equal(converted: Path, model: ShardedModel) -> PreTrainedModel:
    """transformers loads the folder, and finds in it what the trainer had, in bfloat16."""
    loaded = AutoModelForCausalLM.from_pretrained(converted, local_files_only=True)
    assert loaded.dtype == torch.bfloat16
    trained, untrained = dict(model.export_weights()), stored_tensors(model.spec.path)
    stored = stored_tensors(converted)
    assert set(stored) == set(trained)
    for name, weight in trained.items():
        assert torch.equal(stored[name], weight.bfloat16()), name
        assert not torch.equal(stored[name], untrained[name].bfloat16()), name
    return loaded


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.usefixtures("alone")
def test_the_converter_takes_the_runs_own_base_model_and_says_so(project: Path) -> None:
    model = save_trained(project, "Qwen3-8B", "qwen3-grpo-8b", groupgemm=False)
    done = shell(project, HERE, CONVERT_8B)
    assert done.returncode == 0, done.stderr
    base = project / "pretrained_models" / "Qwen3-8B"
    assert f"{project}/Qwen3-8B does not exist; taking the run's base model {base} instead" in done.stderr
    converted = project / "output/qwen3-grpo-8b/save_model/huggingface"
    require_equal(converted, model)
    assert AutoTokenizer.from_pretrained(converted).chat_template


@pytest.mark.usefixtures("alone")
def test_the_converter_of_a_mixture_of_experts_with_groupgemm(project: Path) -> None:
    model = save_trained(project, "Qwen3-30B-A3B", "qwen3-grpo-30b-a3b", groupgemm=True)
    done = shell(project, HERE, CONVERT_30B)
    assert done.returncode == 0, done.stderr
    assert "does not exist" not in done.stderr
    loaded = require_equal(project / "output/qwen3-grpo-30b-a3b/save_model/huggingface", model)
    assert loaded.config.num_experts == 8


@pytest.fixture(scope="module")
def arithmetic_project(project: Path) -> Path:
    """The project with the problems of the laptop's path."""
    done = shell(project, ARITHMETIC)
    assert done.returncode == 0, done.stderr
    return project


def test_the_laptop_plan_needs_no_gpu(arithmetic_project: Path) -> None:
    planned = shell(arithmetic_project, LAPTOP_PLAN)
    assert planned.returncode == 0, planned.stderr
    assert "2 processes on the CPU" in planned.stderr


def test_functions_of_ones_own_are_found_and_keep_the_contract(arithmetic_project: Path) -> None:
    project = arithmetic_project
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", (project / "docs" / "extending.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (project / "my_extensions.py").write_text(code)
    planned = shell(arithmetic_project, OWN_FUNCTIONS)
    assert planned.returncode == 0, planned.stderr
    for name in ("brief_and_right", "better_than_worst", "halved"):
        assert f"my_extensions:{name}" in planned.stdout
    tried = shell(project, OWN_CONTRACT)
    assert tried.returncode == 0, tried.stdout
    assert " passed" in tried.stdout


def test_the_page_of_keys_is_generated(project: Path) -> None:
    page = project / "docs" / "config.md"
    written = page.read_text()
    page.write_text("")
    done = shell(project, GENERATE_CONFIG_PAGE)
    assert done.returncode == 0, done.stderr
    assert page.read_text() == written
