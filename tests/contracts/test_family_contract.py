"""What every model family must keep: names and numbers of the checkpoint, and transformers' log-probabilities.

To add a family, add a tiny configuration here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from chatlearn.batch.pack import MicroBatch, pack
from chatlearn.batch.plan import BatchLayout
from chatlearn.models.family import FAMILIES
from chatlearn.records import Sample
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.parallel import ParallelPlan, Rendezvous, close_process_group, open_process_group
from chatlearn.trainer.sharded_model import ShardedModel

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    "Qwen3ForCausalLM": Qwen3Config(**SIZES, head_dim=16),
    "Qwen2ForCausalLM": Qwen2Config(**SIZES),
    "LlamaForCausalLM": LlamaConfig(**SIZES, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "Qwen3MoeForCausalLM": Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0]
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only rank."""
    meeting = tmp_path_factory.mktemp("meeting") / "place"
    open_process_group(0, 1, Rendezvous(f"file://{meeting}", "cpu"))
    yield
    close_process_group()


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model of the family, with no parameter at a special value such as zero or one."""
    logging.disable_progress_bar()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS[request.param], dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


def random_batch() -> tuple[MicroBatch, ...]:
    generator = np.random.default_rng(0)
    samples = []
    for length in (5, 11, 2, 8):
        zeros, mask = np.zeros(length, dtype=np.float32), np.ones(length, dtype=np.bool_)
        samples.append(Sample("", generator.integers(0, 61, length).astype(np.int32), mask, zeros, zeros))
    return pack(samples, BatchLayout(num_data_ranks=1, packing=True, max_tokens=20, micro_batch_size=1)).ranks[0]


def load(spec: ModelSpec) -> ShardedModel:
    return ShardedModel.load(spec, ParallelPlan(1, 1), trainable=False)


@pytest.mark.parametrize("meta_init", [False, True])
def test_names_and_numbers_survive_a_round_trip(model_dir: Path, meta_init: bool) -> None:
    stored = load_file(model_dir / "model.safetensors")
    model = load(ModelSpec(model_dir, meta_init=meta_init))
    exported = {name: weight.clone() for name, weight in model.export_weights()}
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    assert {meta.name: meta.shape for meta in model.metadata()} == {name: tuple(w.shape) for name, w in stored.items()}


@pytest.mark.parametrize("meta_init", [False, True])
def test_logprobs_are_those_of_transformers(model_dir: Path, meta_init: bool) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    batch = random_batch()
    scores = load(ModelSpec(model_dir, meta_init=meta_init)).logprobs(batch)
    for micro_batch, score in zip(batch, scores, strict=True):
        parts = zip(micro_batch.token_ids.split(micro_batch.lengths), score.split(micro_batch.lengths), strict=True)
        for token_ids, got in parts:
            with torch.no_grad():
                distribution = reference(input_ids=token_ids[None]).logits[0].log_softmax(-1)
            expected = distribution[:-1].gather(-1, token_ids[1:, None]).squeeze(-1)
            torch.testing.assert_close(got[:-1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "model_dir", [name for name, family in FAMILIES.items() if family.experts is not None], indirect=True
)
def test_grouped_experts_equal_eager_ones(model_dir: Path) -> None:
    spec, batch = ModelSpec(model_dir), random_batch()
    one, other = load(spec).logprobs(batch), load(replace(spec, grouped_experts=True)).logprobs(batch)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
