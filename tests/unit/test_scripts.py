"""The training scripts: their values, and the 8-GPU plan on a machine without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chatlearn.config.read import read_config
from chatlearn.config.schema import GrpoConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "train_fsdp_vllm_qwen3_8b_grpo.sh": ("Qwen3-8B", "Qwen3ForCausalLM"),
    "train_fsdp_vllm_qwen3_30b_a3b_grpo.sh": ("Qwen3-30B-A3B", "Qwen3MoeForCausalLM"),
    "train_fsdp_vllm_qwen3_235b_a22b_grpo.sh": ("Qwen3-235B-A22B", "Qwen3MoeForCausalLM"),
}
EMBEDDED = {"Qwen3ForCausalLM": "tiny_qwen3", "Qwen3MoeForCausalLM": "tiny_qwen3_moe"}
RECORD = {
    "data_source": "DigitalLearningGmbH/MATH-lighteval",
    "prompt": [{"role": "user", "content": "What is $1 + 1$?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
}
UPSTREAM = """
runtime_args.data_rerank=True runtime_args.max_replay_episode=2 runtime_args.use_partial_rollout=False
models.policy_trainer.free_gpu_memory.free_grad_buffers=True models.policy.vllm_prompt_key=prompt
models.policy.vllm_input_ids_key=input_ids models.policy.enable_stage_resume=False models.policy.seq_length=2048
models.policy.max_seq_len_to_capture=2348 models.reward.generation_batch_size=256
models.partial_rollout_manager.num_cpu=1 models.partial_rollout_manager.cpu_per_process=1
models.partial_rollout_manager.mini_response_per_prompt=16 models.partial_rollout_manager.max_rollout_round=2
models.partial_rollout_manager.rollout_ratio=[0.5,0.5] models.partial_rollout_manager.load=${models.policy.load}
models.rollout_manager.num_cpu=1 models.rollout_manager.cpu_per_process=1
models.rollout_manager.generation_batch_size=${runtime_args.sample_per_episode} models.policy_trainer.packing=False
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with small models and data at the tutorial's paths."""
    for name in ("scripts", "template", "chatlearn"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    data = tmp_path / "dataset" / "MATH-lighteval"
    data.mkdir(parents=True)
    for name in ("train.json", "test.json"):
        (data / name).write_text(json.dumps(RECORD) + "\n")
    for name, architecture in SCRIPTS.values():
        model = tmp_path / "pretrained_models" / name
        shutil.copytree(ROOT / "embedded" / EMBEDDED[architecture], model)
        facts = json.loads((model / "config.json").read_text())
        # As many heads as the large models have, for 8 GPUs are to share them.
        (model / "config.json").write_text(json.dumps(facts | {"num_attention_heads": 32}))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


def launch(project: Path, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "OMP_NUM_THREADS")}
    path = f"{project / 'bin'}:/usr/bin:/bin"
    elsewhere = project / "bin"  # a script may be started from any folder
    return subprocess.run(
        ["bash", str(project / "scripts" / script), *words],
        env={**inherited, "PATH": path, **variables},
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )


def planned(project: Path, script: str, *words: str, **variables: str) -> tuple[GrpoConfig, str]:
    done = launch(project, script, "--dry-run", *words, **variables)
    assert done.returncode == 0, done.stderr
    resolved = project / "resolved.yaml"
    resolved.write_text(done.stdout)
    return read_config(resolved), done.stderr


def test_the_8b_script_shows_the_8_gpu_plan(project: Path) -> None:
    script = "fsdp_vllm/train_fsdp_vllm_qwen3_8b_grpo.sh"
    config, plan = planned(project, script, "runtime_args.num_episode=3", GPUS_PER_NODE="8")
    runtime, trainer, policy = config.runtime_args, config.models.policy_trainer, config.models.policy
    assert runtime.num_episode == 3
    assert (runtime.sample_per_episode, runtime.train_global_batch_size, runtime.train_micro_batch_size) == (
        512,
        512,
        64,
    )
    assert (runtime.save_episode_interval, runtime.eval_episode_interval) == (5, 5)
    assert (runtime.output_dir, runtime.enable_eval_before_training) == ("output/qwen3-grpo-8b", True)
    assert (trainer.num_gpu, trainer.packing, trainer.max_token_in_packing, trainer.save_hf) == (8, True, 32768, True)
    assert (trainer.optimizer.lr, trainer.pos_clip_ratio, trainer.neg_clip_ratio, trainer.kl_coef) == (
        2e-6,
        0.2,
        0.2,
        0,
    )
    assert (policy.num_gpu, policy.tensor_model_parallel_size, policy.num_inference_per_prompt) == (8, 1, 32)
    assert (policy.max_prompt_tokens_length, policy.max_response_tokens_length) == (1024, 2048)
    assert (policy.generation_batch_size, policy.gpu_memory_utilization, policy.enforce_eager) == (64, 0.85, False)
    assert "policy + policy_trainer" in plan
    assert "8 GPUs" in plan
    assert not (project / "output").exists()


def test_the_mixtures_of_experts(project: Path) -> None:
    small, _ = planned(project, "train_fsdp_vllm_qwen3_30b_a3b_grpo.sh", GPUS_PER_NODE="8")
    assert (small.models.policy_trainer.groupgemm, small.models.policy_trainer.meta_init) == (True, True)
    assert (small.models.policy_trainer.max_token_in_packing, small.models.policy.tensor_model_parallel_size) == (
        20000,
        2,
    )
    assert (small.models.policy.generation_batch_size, small.models.policy.enforce_eager) == (128, True)
    large, plan = planned(project, "train_fsdp_vllm_qwen3_235b_a22b_grpo.sh", GPUS_PER_NODE="8", NNODES="8", RANK="0")
    assert (large.models.policy_trainer.num_gpu, large.models.policy.tensor_model_parallel_size) == (64, 8)
    assert (large.runtime_args.sample_per_episode, large.models.policy_trainer.save_hf) == (2048, False)
    assert "64 GPUs" in plan


def test_without_a_gpu_the_script_says_how_to_see_the_plan(project: Path) -> None:
    done = launch(project, "train_fsdp_vllm_qwen3_8b_grpo.sh", "--dry-run", GPUS_PER_NODE="0")
    assert done.returncode == 2
    assert "GPUS_PER_NODE=8" in done.stderr


def test_a_run_that_cannot_start_leaves_its_status_and_a_log(project: Path) -> None:
    done = launch(project, "train_fsdp_vllm_qwen3_8b_grpo.sh", "runtime_args.num_episod=3", GPUS_PER_NODE="8")
    assert done.returncode == 2
    said = (
        "wrong configuration or command: unknown key runtime_args.num_episod; did you mean runtime_args.num_episode?\n"
    )
    assert (project / "log_qwen3-grpo-8b.log").read_text() == said


def test_no_script_stops_the_ray_of_others_or_deletes_files() -> None:
    for script in (ROOT / "scripts").rglob("*.sh"):
        commands = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not any("ray stop" in line or "rm core" in line or "pkill" in line for line in commands), script


def test_the_original_template_and_its_script_are_understood() -> None:
    """Keys of the original's template that ours leaves out, at the original's values."""
    config = read_config(ROOT / "template" / "grpo_fsdp.yaml", UPSTREAM.split())
    assert config.models.policy_trainer.packing is False
    assert len(config.origin.inert_keys) == 14
