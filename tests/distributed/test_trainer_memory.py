"""Memory is saved without changing a number: what is kept, recomputed, read, sent home or left there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cases
import memory_cases
import numpy as np
import pytest
from cases import Setup
from gang import GangOf
from memory_cases import Outcome
from test_trainer_model import LOGPROBS, stored_weights

from chatlearn.records import Sample

NUM_LAYERS = 2


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return cases.random_samples(6, with_old=True)


@pytest.mark.parametrize("model", ["untied", "moe"])
def test_selective_checkpointing_never_repeats_attention(
    gang_of: GangOf, models: dict[str, Path], samples: list[Sample], model: str
) -> None:
    """Three samples a rank, two layers: six calls of attention, once or twice."""
    setup = Setup(models[model], packing=False, micro_batch_size=3, whole_below_bytes=0)
    off, selective, full = (
        gang_of(2).run(memory_cases.cost_of_a_step, replace(setup, checkpointing=kept), samples)[0]
        for kept in ("off", "selective", "full")
    )
    calls = 3 * NUM_LAYERS
    assert (off.attention_in_forward, off.attention_in_backward) == (calls, 0)
    assert (selective.attention_in_forward, selective.attention_in_backward) == (calls, 0)
    assert (full.attention_in_forward, full.attention_in_backward) == (calls, calls)
    for cost in (selective, full):
        assert cases.worst_difference(cost.gradients, off.gradients) < 1e-6


def test_what_is_computed_again_need_not_be_kept(
    gang_of: GangOf, models: dict[str, Path], samples: list[Sample]
) -> None:
    setup = Setup(models["untied"], packing=False, micro_batch_size=6)
    off, selective, full = (
        gang_of(1).run(memory_cases.bytes_kept, replace(setup, checkpointing=kept), samples)[0]
        for kept in ("off", "selective", "full")
    )
    assert off > selective > full
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    width, num_heads = 64, 4  # of attention's result; a number for each head goes with it
    assert selective - full == pytest.approx(NUM_LAYERS * num_tokens * (width + num_heads) * 4, rel=0.05)


@pytest.mark.parametrize(("meta_init", "whole_below_bytes"), [(False, 0), (True, 2**30)])
def test_weights_that_stay_on_the_host_learn_the_same(
    gang_of: GangOf, models: dict[str, Path], samples: list[Sample], meta_init: bool, whole_below_bytes: int
) -> None:
    setup = Setup(models["moe"], meta_init=meta_init, whole_below_bytes=whole_below_bytes, max_tokens=64)
    expected = gang_of(2).run(memory_cases.train_on_device, setup, samples)[0]
    assert_same(gang_of(2).run(memory_cases.train_on_host, setup, samples)[0], expected)


@pytest.mark.parametrize(("model", "num_ranks"), [("tied", 2), ("moe", 4)])
def test_a_journey_home_loses_nothing_and_reuses_its_memory(
    gang_of: GangOf, models: dict[str, Path], samples: list[Sample], model: str, num_ranks: int
) -> None:
    """Over four ranks some shards are padded, and one rank has none of the five experts."""
    setup = Setup(models[model], num_steps=2)
    expected = gang_of(num_ranks).run(memory_cases.train_on_device, setup, samples)[0]
    outcome, journey = gang_of(num_ranks).run(memory_cases.train_between_journeys, setup, samples)[0]
    assert_same(outcome, expected)
    for there, home, back, _, same_home, _ in (journey.weights[:6], journey.states[3:]):
        assert there.keys() == home.keys() == back.keys()
        assert all(home[name] not in (there[name], back[name]) for name in home), "everything moves"
        assert home == same_home, "a second stay needs no new memory"


def assert_same(got: Outcome, expected: Outcome) -> None:
    """To the last bit."""
    assert got.stats == expected.stats
    assert all(np.array_equal(one, other) for one, other in zip(got.scores, expected.scores, strict=True))
    assert cases.worst_difference(got.weights, expected.weights) == 0.0


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("model", ["tied", "moe"])
def test_ranks_together_read_a_checkpoint_once(
    gang_of: GangOf, models: dict[str, Path], model: str, trainable: bool
) -> None:
    num_stored = sum(weight.size for weight in stored_weights(models[model]).values())
    results = gang_of(4).run(memory_cases.numbers_read, Setup(models[model], meta_init=True), trainable)
    assert all(is_whole for _, is_whole in results)
    assert sum(num_read for num_read, _ in results) == num_stored


@pytest.mark.parametrize("trainable", [True, False])
def test_a_tied_head_is_the_embedding_after_meta_initialisation(
    gang_of: GangOf, models: dict[str, Path], trainable: bool
) -> None:
    """The original trained and scored with a head of zeros."""
    stored = stored_weights(models["tied"])
    for is_tied, weights in gang_of(2).run(
        memory_cases.head_and_embedding, Setup(models["tied"], meta_init=True), trainable
    ):
        assert is_tied
        assert np.abs(weights["model.embed_tokens.weight"]).max() > 0
        assert cases.worst_difference(weights, stored) == 0.0


@pytest.mark.parametrize("meta_init", [False, True])
def test_a_reference_in_replicas_says_what_transformers_says(
    gang_of: GangOf, models: dict[str, Path], samples: list[Sample], meta_init: bool
) -> None:
    setup = Setup(models["tied"], fsdp_size=2, meta_init=meta_init, max_tokens=64, whole_below_bytes=0)
    expected = gang_of(1).run(cases.transformers_scores, setup.path, samples, setup.temperature)[0]
    for scores in gang_of(4).run(cases.score, setup, samples, False):
        for got, wanted in zip(scores, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=LOGPROBS)
