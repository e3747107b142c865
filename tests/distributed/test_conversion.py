"""Every kind of model, saved by 1, 2 and 4 ranks and converted: transformers and vLLM compute the trainer's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Setup, exported, random_samples, scores_of, step, trainer_of, transformers_scores
from gang import Gang
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny_models import MIXTURE, SIZES, write
from transformers import Qwen3Config, Qwen3MoeConfig

from chatlearn.checkpoint.adapters import AdapterRecord
from chatlearn.checkpoint.convert import convert
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import FileRecord, Manifest
from chatlearn.checkpoint.sharded import save_shards
from chatlearn.models.lora import LoraSpec
from chatlearn.trainer.build import ModelSpec

ROOT = Path(__file__).parents[2]
ITERATION = 2
TOLERANCE = 1e-5
VLLM_TOLERANCE = 1e-4  # float32 on both sides; a token of small probability carries the rounding of large logits

WIDE_HEADS = SIZES | {"head_dim": 32}  # vLLM knows no smaller ones
DENSE, MIXED = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"


@dataclass(frozen=True)
class Kind:
    """A row of the matrix: which model is trained, and how."""

    model: str
    architecture: str
    grouped: bool = False
    lora: LoraSpec | None = None


KINDS = {
    "tied": Kind("tied", DENSE),
    "untied": Kind("untied", DENSE),
    "experts": Kind("moe", MIXED),
    "grouped experts": Kind("moe", MIXED, grouped=True),
    "adapter": Kind("untied", DENSE, lora=LoraSpec(rank=3, alpha=6.0)),
    "adapter beside experts": Kind("moe", MIXED, grouped=True, lora=LoraSpec(rank=3, alpha=6.0)),
}
# Which conversions vLLM loads, and by how many ranks they were saved.
FOR_VLLM = {"tied": 4, "untied": 2, "grouped experts": 4, "adapter": 2}


@dataclass(frozen=True)
class AdaptedSetup(Setup):
    """A setup that may train an adapter."""

    lora: LoraSpec | None = None

    def spec(self) -> ModelSpec:
        return replace(super().spec(), lora=self.lora)


@dataclass(frozen=True)
class Saved:
    """The root of a published checkpoint, its base model, and what the trainer made of the samples when it saved."""

    root: Path
    base: Path
    scores: list[NDArray[np.float32]]
    weights: dict[str, NDArray[np.float32]]


def train_and_save(
    setup: AdaptedSetup, staging: Path
) -> tuple[tuple[FileRecord, ...], list[NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    trainer, samples = trainer_of(setup), random_samples(6)
    for _ in range(ITERATION):
        step(trainer, setup, samples)
    files = save_shards(staging, trainer.model.module, trainer.optimizer)
    return files, scores_of(trainer.model, setup, samples), exported(trainer.model)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In one file and in several."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "tied": write(Qwen3Config(**WIDE_HEADS, tie_word_embeddings=True), folder / "tied", "1GB"),
        "untied": write(Qwen3Config(**WIDE_HEADS, tie_word_embeddings=False), folder / "untied", "20KB"),
        "moe": write(Qwen3MoeConfig(**WIDE_HEADS, **MIXTURE, tie_word_embeddings=False), folder / "moe", "30KB"),
    }


@pytest.fixture(scope="module")
def saved_by(
    gang_of: Callable[[int], Gang], bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Saved]:
    """The checkpoint of a kind by a number of ranks, made once."""
    made: dict[tuple[str, int], Saved] = {}

    def get(name: str, num_ranks: int) -> Saved:
        if (name, num_ranks) not in made:
            kind, base = KINDS[name], bases[KINDS[name].model]
            root = tmp_path_factory.mktemp(f"{kind.model}_{num_ranks}") / "save_model" / "policy_trainer"
            setup = AdaptedSetup(base, lr=1e-2, temperature=1.0, grouped_experts=kind.grouped, lora=kind.lora)
            answers = gang_of(num_ranks).run(train_and_save, setup, begin(root, ITERATION))
            files = tuple(record for reported, _, _ in answers for record in reported)
            manifest = Manifest(ITERATION, 1, str(base), kind.architecture, kind.grouped, num_ranks, files)
            publish(root, replace(manifest, adapter=AdapterRecord.of(kind.lora, base)))
            made[name, num_ranks] = Saved(root, base, *answers[0][1:])
        return made[name, num_ranks]

    return get


def largest(left: list[NDArray[np.float32]], right: list[NDArray[np.float32]]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", list(KINDS))
def test_transformers_scores_the_conversion_as_the_trainer_scored(
    saved_by: Callable[[str, int], Saved], tmp_path: Path, name: str, num_ranks: int
) -> None:
    saved, samples = saved_by(name, num_ranks), random_samples(6)
    report = convert(saved.base, saved.root, tmp_path / "hf", ITERATION, KINDS[name].grouped, dtype="float32")
    assert report.notes == ()
    assert largest(transformers_scores(tmp_path / "hf", samples, 1.0), saved.scores) < TOLERANCE
    assert largest(transformers_scores(saved.base, samples, 1.0), saved.scores) > 1e-3, "nothing was trained"
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored.keys() == saved.weights.keys()
    assert all(np.allclose(stored[weight], saved.weights[weight], rtol=0, atol=1e-6) for weight in stored)


def test_vllm_loads_the_rounded_conversion_and_agrees_with_transformers(
    saved_by: Callable[[str, int], Saved], tmp_path: Path
) -> None:
    folders = {name: tmp_path / name.replace(" ", "_") for name in FOR_VLLM}
    for name, folder in folders.items():
        saved = saved_by(name, FOR_VLLM[name])
        convert(saved.base, saved.root, folder, ITERATION, KINDS[name].grouped)
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    program = [sys.executable, str(Path(__file__).with_name("vllm_agreement.py")), *map(str, folders.values())]
    checked = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr[-3000:]
    gaps = json.loads(checked.stdout.splitlines()[-1])
    assert gaps.keys() == {str(folder) for folder in folders.values()}
    assert max(gaps.values()) < VLLM_TOLERANCE, gaps
