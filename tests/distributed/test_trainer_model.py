"""A sharded model says what plain transformers says, and gives back the weights it was given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from cases import Setup
from gang import GangOf
from safetensors.torch import load_file

LOGPROBS = 1e-5


def stored_weights(path: Path) -> cases.Weights:
    """Everything in the safetensors files of a model directory."""
    return {
        name: weight.float().numpy()
        for file in sorted(path.glob("*.safetensors"))
        for name, weight in load_file(file).items()
    }


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("model", ["tied", "untied", "moe"])
def test_logprobs_equal_transformers(gang_of: GangOf, models: dict[str, Path], model: str, trainable: bool) -> None:
    samples = cases.random_samples(9, seed=1)
    setup = Setup(models[model], max_tokens=64, meta_init=trainable)
    expected = gang_of(1).run(cases.transformers_scores, setup.path, samples, setup.temperature)[0]
    for scores in gang_of(2).run(cases.score, setup, samples, trainable):
        for got, wanted in zip(scores, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=LOGPROBS)


def test_packed_sequences_never_see_their_neighbours(gang_of: GangOf, models: dict[str, Path]) -> None:
    samples = cases.random_samples(5, seed=2)
    others = cases.random_samples(5, seed=4)
    setup = Setup(models["tied"])
    together = gang_of(1).run(cases.score, setup, samples, False)[0]
    for index in (0, 2, 4):
        # Same lengths and places, other tokens: what stays is exactly what it was.
        strangers = [
            replace(sample, token_ids=np.resize(other.token_ids, sample.token_ids.shape))
            if other_index != index
            else sample
            for other_index, (sample, other) in enumerate(zip(samples, others, strict=True))
        ]
        apart = gang_of(1).run(cases.score, setup, strangers, False)[0]
        assert np.array_equal(apart[index], together[index])
        assert not np.array_equal(apart[index - 1], together[index - 1]), "the test is to change the neighbours"


@pytest.mark.parametrize("whole_below_bytes", [0, 2**30])
def test_scores_follow_the_weights(gang_of: GangOf, models: dict[str, Path], whole_below_bytes: int) -> None:
    """Weights that stay gathered after scoring would be the old ones after a step."""
    samples = cases.random_samples(6, seed=6)
    setup = Setup(models["untied"], lr=1e-2, whole_below_bytes=whole_below_bytes)
    scores, weights = gang_of(2).run(cases.score_around_a_step, setup, samples)[0]
    expected = gang_of(1).run(cases.scores_of_weights, setup.path, weights, samples, setup.temperature)[0]
    for got, wanted in zip(scores, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=LOGPROBS)


@pytest.mark.parametrize("meta_init", [True, False])
@pytest.mark.parametrize("model", ["tied", "untied", "moe"])
def test_export_gives_back_what_was_loaded(
    gang_of: GangOf, models: dict[str, Path], model: str, meta_init: bool
) -> None:
    stored = stored_weights(models[model])
    results = gang_of(2).run(cases.export_untouched, Setup(models[model], meta_init=meta_init))
    for weights, metadata in results:
        assert weights.keys() == stored.keys()
        assert all(np.array_equal(weights[name], stored[name]) for name in stored)
        assert [meta.name for meta in metadata] == list(weights)
        assert all(meta.shape == weights[meta.name].shape for meta in metadata)
        assert {meta.dtype for meta in metadata} == {"float32"}


@pytest.mark.parametrize("model", ["tied", "untied", "moe"])
def test_utilisation_counts_the_weights_a_token_meets(gang_of: GangOf, models: dict[str, Path], model: str) -> None:
    used = 0.0
    for name, weight in stored_weights(models[model]).items():
        looked_up = model != "tied" and name == "model.embed_tokens.weight"
        used += 0 if looked_up else weight.size * (2 / 5 if ".experts." in name else 1)
    assert gang_of(2).run(cases.flops_per_token, Setup(models[model]))[0] == pytest.approx(6 * used)


def test_half_precision_keeps_float32_masters(gang_of: GangOf, models: dict[str, Path]) -> None:
    setup = Setup(models["tied"], compute_dtype="bfloat16")
    assert gang_of(2).run(cases.master_dtypes, setup, True)[0] == ({torch.float32}, {torch.bfloat16})
    assert gang_of(2).run(cases.master_dtypes, setup, False)[0] == ({torch.bfloat16}, {torch.bfloat16})


def test_half_precision_trains_like_single(gang_of: GangOf, models: dict[str, Path]) -> None:
    samples = cases.random_samples(12)
    setup = Setup(models["tied"], num_steps=1)
    single = gang_of(2).run(cases.train, setup, samples)[0][0]
    for size in (1, 2):
        shared = replace(setup, compute_dtype="bfloat16", sequence_parallel_size=size)
        half = gang_of(2).run(cases.train, shared, samples)[0][0]
        assert half[0].grad_norm == pytest.approx(single[0].grad_norm, rel=0.05)
        assert half[0].grad_norm != single[0].grad_norm, "the test is to compute in half precision"


@pytest.mark.parametrize("model", ["tied", "moe"])
def test_a_reference_may_share_sequences_and_shards(gang_of: GangOf, models: dict[str, Path], model: str) -> None:
    """Two ranks a sequence, two replicas of two shards; all ranks of a sequence answer for the whole of it."""
    samples = cases.random_samples(5, seed=1)
    setup = Setup(models[model], max_tokens=64)
    expected = gang_of(1).run(cases.transformers_scores, setup.path, samples, setup.temperature)[0]
    shared = replace(setup, sequence_parallel_size=2, fsdp_size=2, meta_init=True, checkpointing="off")
    for answers in gang_of(4).run(cases.all_scores, shared, samples):
        for scores in answers:
            for got, wanted in zip(scores, expected, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=0, atol=LOGPROBS)


def test_heads_that_cannot_be_dealt_are_refused(gang_of: GangOf, models: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((models["tied"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3, "num_key_value_heads": 1}))
    message = gang_of(2).run(cases.load_error, Setup(tmp_path, sequence_parallel_size=2))[0]
    assert message == (
        "ConfigError: ulysses_sequence_parallel_size=2 must be at least 1 and divide both the number of ranks "
        "num_gpu=2 and the model's 3 attention heads; use 1"
    )
