"""An adapter on a small real model: where it sits, what it begins with, how it is switched off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from chatlearn.checkpoint.adapters import AdapterRecord
from chatlearn.checkpoint.manifest import Manifest, read_manifest, write_manifest
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.models.family import FAMILIES
from chatlearn.models.lora import Factors, LoraSpec, is_adapter, merged, without_adapter
from chatlearn.trainer.adapter import adapter_off, adapter_weights, first_values, initialise, load_adapter, put_on

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "Qwen3ForCausalLM": Qwen3Config(**SIZES, head_dim=8),
    "Qwen2ForCausalLM": Qwen2Config(**SIZES),
    "LlamaForCausalLM": LlamaConfig(**SIZES),
    "Qwen3MoeForCausalLM": Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12
    ),
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
TOKENS = torch.arange(12).reshape(2, 6)
SPEC = LoraSpec(rank=2, alpha=8.0)


def plain(architecture: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float32).eval()


def adapted(architecture: str, spec: LoraSpec = SPEC) -> PreTrainedModel:
    """The model of ``plain`` with a new adapter."""
    model = plain(architecture)
    put_on(model, FAMILIES[architecture], spec)
    initialise(model)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """The model with an adapter that matters."""
    generator = torch.Generator().manual_seed(2)
    load_adapter(model, {name: torch.randn(a.shape, generator=generator) * 0.3 for name, a in adapter_weights(model)})
    return model


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_linear_layer_of_the_blocks_is_adapted_and_nothing_else(architecture: str) -> None:
    names = {name for name, _ in adapted(architecture).named_parameters()}
    layers = {name.split(".lora_A.")[0] for name in names if ".lora_A." in name}
    mixture = architecture == "Qwen3MoeForCausalLM"
    expected = ATTENTION if mixture else ATTENTION | {"gate_proj", "up_proj", "down_proj"}
    assert {layer.rpartition(".")[2] for layer in layers} == expected
    assert len(layers) == 2 * len(expected)
    stored = {name for name, _ in plain(architecture).named_parameters()}
    assert {without_adapter(name) for name in names if not is_adapter(name)} == stored


@pytest.mark.parametrize("architecture", CONFIGS)
def test_an_adapter_begins_as_its_base_and_merges_into_what_it_computes(architecture: str) -> None:
    model, base = adapted(architecture), plain(architecture)
    assert torch.equal(logits(model), logits(base))
    trained(model)
    factors = dict(adapter_weights(model))
    weights = base.state_dict()
    for name, weight in weights.items():
        pair = Factors.of(name)
        if pair.a in factors:
            weights[name] = merged(weight, factors[pair.a], factors[pair.b], SPEC)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 0.1
    base.load_state_dict(weights)
    assert torch.allclose(logits(base), expected, atol=1e-5, rtol=0)


def test_switched_off_it_is_the_base_and_nobody_trains_otherwise_after() -> None:
    model = trained(adapted("Qwen3ForCausalLM"))
    expected = logits(model)
    for trains in (True, False):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains and is_adapter(name))
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        with adapter_off(model):
            assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
            assert torch.equal(logits(model), logits(plain("Qwen3ForCausalLM")))
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
        assert torch.equal(logits(model), expected)


def test_names_of_layers_that_are_not_there_are_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no linear layer called gate or head; they have k_proj, o_proj, q_proj, v"):
        adapted("Qwen3MoeForCausalLM", LoraSpec(2, 8.0, ("q_proj", "gate", "head")))
    one = adapted("Qwen3ForCausalLM", LoraSpec(2, 8.0, ("down_proj",)))
    assert [name for name, _ in adapter_weights(one)] == [
        f"model.layers.{layer}.mlp.down_proj.lora_{factor}.default.weight" for layer in (0, 1) for factor in "AB"
    ]


def test_a_rank_and_a_factor_are_needed() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraSpec(0, -1.0)
    assert caught.value.problems == ("lora.rank=0 must be at least 1", "lora.alpha=-1.0 must be more than 0")


def test_first_values_follow_from_the_name_alone() -> None:
    torch.manual_seed(5)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    one = first_values(name, (8, 64))
    torch.manual_seed(6)
    assert torch.equal(first_values(name, (8, 64)), one)
    assert not torch.equal(first_values(name.replace("0", "1"), (8, 64)), one)
    assert 0.9 / 8 < one.abs().max() <= 1 / 8
    assert first_values(name.replace("lora_A", "lora_B"), (64, 8)).count_nonzero() == 0


def test_an_adapter_of_another_kind_is_not_loaded() -> None:
    model = trained(adapted("Qwen3ForCausalLM"))
    kept = dict(adapter_weights(model))
    for stranger, complaint in (
        (LoraSpec(2, 8.0, ("q_proj",)), r"differ, first in 'model\.layers\.0\.mlp\.down_proj"),
        (LoraSpec(3, 8.0), r"was kept with shape \(3, 16\); this model's has \(2, 16\)"),
    ):
        other = dict(adapter_weights(adapted("Qwen3ForCausalLM", stranger)))
        with pytest.raises(CheckpointError, match=complaint):
            load_adapter(model, other)
    assert all(torch.equal(factor, kept[name]) for name, factor in adapter_weights(model))


def test_a_manifest_remembers_the_adapter(tmp_path: Path) -> None:
    record = AdapterRecord(LoraSpec(16, 32.0, ("q_proj", "v_proj")), "0123")
    manifest = Manifest(7, 7, "/base", "Qwen3ForCausalLM", groupgemm=False, num_ranks=2, adapter=record)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    path = tmp_path / "checkpoint.json"
    document = json.loads(path.read_text()) | {"schema_version": 1}  # which had no checksum of itself
    del document["checksum"]
    for damage, complaint in (
        ({"adapter": 3}, "'adapter' is 3"),
        ({"adapter": {"lora": None}}, "'lora' is None"),
        ({"adapter": {"lora": {"rank": 0, "alpha": 1, "target_modules": []}}}, r"lora\.rank=0 must be at least 1"),
        ({"adapter": {"lora": {"rank": 1, "alpha": True, "target_modules": []}}}, "'alpha' is True"),
        ({"adapter": {"lora": {"rank": 1, "alpha": 1, "target_modules": "q"}}}, "'target_modules' is 'q'"),
    ):
        path.write_text(json.dumps(document | damage))
        with pytest.raises(CheckpointError, match=complaint):
            read_manifest(tmp_path)
    del document["adapter"]  # as written before there were any
    path.write_text(json.dumps(document))
    assert read_manifest(tmp_path).adapter is None
