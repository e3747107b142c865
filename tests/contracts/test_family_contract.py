"""What every model family must keep: names and numbers of the checkpoint, log-probabilities and gradients.

To add a family, add a tiny configuration here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from benchmarks.trl_reference import stored_gradients
from chatlearn.algorithm.loss import POLICY_LOSSES, ClipRange
from chatlearn.batch.pack import TrainBatch, pack
from chatlearn.batch.plan import BatchLayout
from chatlearn.models.family import FAMILIES, family_of
from chatlearn.records import Sample
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.objective import Objective
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.parallel import ParallelPlan, Rendezvous, close_process_group, open_process_group
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.sharded_model import ShardedModel

RELATIVE = 1e-5
# A gradient that is nearly zero beside the whole one is measured by the whole one.
SMALL = 1e-3
ENTROPY_COEF = 0.05
TEMPERATURE = 1.3

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# As Llama 3.1 and 3.2 have it, but for a context so short that the frequencies of tiny heads fall into all three of its
# ranges; and as Qwen2.5 and Qwen3 are told to for long contexts.
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}

CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    "Qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    "Qwen3, tied, long contexts": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters=YARN),
    "Qwen3-MoE": Qwen3MoeConfig(
        **SIZES, **EXPERTS, head_dim=16, mlp_only_layers=[0], tie_word_embeddings=False, norm_topk_prob=False
    ),
    "Qwen3-MoE, tied": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, tie_word_embeddings=True, norm_topk_prob=True),
    "Qwen2.5": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "Qwen2.5, tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "Llama": LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LINEAR),
    "Llama 3.2, tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA_3),
}
WITH_EXPERTS = [name for name, config in CONFIGURATIONS.items() if isinstance(config, Qwen3MoeConfig)]
WITH_SCALED_POSITIONS = [
    name for name, config in CONFIGURATIONS.items() if config.rope_parameters["rope_type"] != "default"
]


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only rank."""
    meeting = tmp_path_factory.mktemp("meeting") / "place"
    open_process_group(0, 1, Rendezvous(f"file://{meeting}", "cpu"))
    yield
    close_process_group()


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model of the family, with no parameter at a special value such as zero or one."""
    logging.disable_progress_bar()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS[request.param], dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def random_samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    samples = []
    for length, advantage in ((5, 0.7), (11, -1.2), (2, 1.5), (8, -0.4)):
        mask = np.arange(length) > 0
        samples.append(
            Sample(
                prompt_uid="",
                token_ids=generator.integers(0, 61, length).astype(np.int32),
                loss_mask=mask,
                rollout_logprobs=np.zeros(length, dtype=np.float32),
                advantages=np.where(mask, advantage, 0).astype(np.float32),
            )
        )
    return samples


def packed(samples: Sequence[Sample]) -> TrainBatch:
    return pack(samples, BatchLayout(num_data_ranks=1, packing=True, max_tokens=20, micro_batch_size=1))


def load(spec: ModelSpec, *, trainable: bool = False) -> ShardedModel:
    return ShardedModel.load(spec, ParallelPlan(1, 1), trainable=trainable)


def plain_model(model_dir: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as everybody loads it."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager")


def plain_guesses(model: PreTrainedModel, token_ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token [T - 1] after the first, and the entropy of the guess."""
    distribution = (model(input_ids=token_ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
    logprobs = distribution.gather(-1, token_ids[1:, None]).squeeze(-1)
    return logprobs, -(distribution.exp() * distribution).sum(-1)


def test_every_family_is_here() -> None:
    names = [type(AutoModelForCausalLM.from_config(config)).__name__ for config in CONFIGURATIONS.values()]
    assert set(names) == set(FAMILIES)


@pytest.mark.parametrize("meta_init", [False, True])
def test_names_and_numbers_survive_a_round_trip(model_dir: Path, meta_init: bool) -> None:
    stored = load_file(model_dir / "model.safetensors")
    model = load(ModelSpec(model_dir, meta_init=meta_init))
    assert model.family is family_of(model_dir)
    exported = {name: weight.clone() for name, weight in model.export_weights()}
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    assert {meta.name: meta.shape for meta in model.metadata()} == {name: tuple(w.shape) for name, w in stored.items()}


@pytest.mark.parametrize("meta_init", [False, True])
def test_logprobs_are_those_of_transformers(model_dir: Path, meta_init: bool) -> None:
    reference, samples = plain_model(model_dir), random_samples()
    batch = packed(samples).ranks[0]
    scores = load(ModelSpec(model_dir, meta_init=meta_init)).logprobs(batch)
    for micro_batch, score in zip(batch, scores, strict=True):
        parts = zip(micro_batch.token_ids.split(micro_batch.lengths), score.split(micro_batch.lengths), strict=True)
        for token_ids, got in parts:
            with torch.no_grad():
                expected, _ = plain_guesses(reference, token_ids)
            torch.testing.assert_close(got[:-1], expected, rtol=0, atol=RELATIVE)


def test_gradients_are_those_of_transformers(model_dir: Path) -> None:
    assert_same_gradients(ModelSpec(model_dir, temperature=TEMPERATURE))


@pytest.mark.parametrize("model_dir", WITH_EXPERTS, indirect=True)
def test_gradients_of_grouped_experts_are_those_of_transformers(model_dir: Path) -> None:
    assert_same_gradients(ModelSpec(model_dir, temperature=TEMPERATURE, grouped_experts=True, meta_init=True))


def assert_same_gradients(spec: ModelSpec) -> None:
    samples = random_samples()
    batch = packed(samples)
    clip = ClipRange(low=0.2, high=0.2, max_log_ratio=10.0, dual=3.0)
    objective = Objective(POLICY_LOSSES["grpo"], clip, entropy_coef=ENTROPY_COEF)
    trainer = PolicyTrainer(load(spec, trainable=True), OptimizerSpec(lr=1e-3), objective)
    trainer.accumulate(batch.ranks[0], batch.num_loss_tokens)
    gradients = dict(trainer.gradients())

    model = plain_model(spec.path)
    for sample in samples:
        logprobs, entropy = plain_guesses(model, torch.from_numpy(sample.token_ids).long(), spec.temperature)
        gain = torch.from_numpy(sample.advantages[1:]) * logprobs + ENTROPY_COEF * entropy
        (-gain.sum() / batch.num_loss_tokens).backward()
    expected = stored_gradients(model)

    assert gradients.keys() == expected.keys()
    floor = SMALL * sum(gradient.square().sum() for gradient in expected.values()) ** 0.5
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() / max(gradient.norm(), floor) < RELATIVE, name
    assert all(gradient.any() for gradient in expected.values()), "every parameter is to take part"


@pytest.mark.parametrize("model_dir", WITH_EXPERTS, indirect=True)
def test_grouped_experts_equal_eager_ones(model_dir: Path) -> None:
    spec, batch = ModelSpec(model_dir), packed(random_samples()).ranks[0]
    one, other = load(spec).logprobs(batch), load(replace(spec, grouped_experts=True)).logprobs(batch)
    torch.testing.assert_close(one, other, rtol=0, atol=RELATIVE)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("meta_init", [False, True])
def test_what_no_checkpoint_holds_is_right_after_loading(model_dir: Path, meta_init: bool, compute_dtype: str) -> None:
    """Rotary frequencies are computed, and stay in float32 whatever one computes with."""
    reference = plain_model(model_dir, getattr(torch, compute_dtype))
    module = load(ModelSpec(model_dir, compute_dtype=compute_dtype, meta_init=meta_init)).module
    expected, got = dict(reference.named_buffers()), dict(module.named_buffers())
    assert got.keys() == expected.keys()
    for name, buffer in expected.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], buffer), name
    assert module.model.rotary_emb.attention_scaling == reference.model.rotary_emb.attention_scaling


@pytest.mark.parametrize("model_dir", WITH_SCALED_POSITIONS, indirect=True)
def test_scaled_positions_are_understood_in_the_words_of_older_checkpoints(model_dir: Path, tmp_path: Path) -> None:
    """The hub's ``config.json`` says ``rope_scaling`` and ``rope_theta`` where transformers now says one thing."""
    described = json.loads((model_dir / "config.json").read_text())
    scaling = described.pop("rope_parameters")
    theta = scaling.pop("rope_theta")
    for file in model_dir.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**described, "rope_theta": theta, "rope_scaling": scaling}))

    new, old = (load(ModelSpec(folder, meta_init=True)).module.model.rotary_emb for folder in (model_dir, tmp_path))
    assert torch.equal(new.inv_freq, old.inv_freq)
    assert new.attention_scaling == old.attention_scaling
    unscaled = theta ** (-torch.arange(0, 2 * len(new.inv_freq), 2) / (2 * len(new.inv_freq)))
    assert not torch.allclose(new.inv_freq, unscaled), "the test is to scale"
