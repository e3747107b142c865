"""What a run needs on the host follows from numbers, and what is missing is said with the keys that help."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatlearn.budget import (
    BudgetLine,
    EngineLoad,
    EpisodeLoad,
    HostLoad,
    ShardedLoad,
    budget_problem,
    host_budget,
    needed_bytes,
    num_parameters,
)

GB = 10**9

TRAINER = ShardedLoad(
    role="policy_trainer",
    num_parameters=10**9,
    num_trained=10**9,
    num_ranks=8,
    fsdp_size=8,
    weight_bytes=4,
    moment_bytes=4,
    meta_init=False,
    weights_on_host=False,
    gradients_on_host=False,
    moments_on_host=False,
    stays_gathered=False,
    copied_for_saving=False,
)
EVERYTHING_AT_HOME = replace(TRAINER, weights_on_host=True, gradients_on_host=True, moments_on_host=True)
LOAD = HostLoad(
    sharded=(TRAINER,),
    engine=EngineLoad(num_parameters=10**9, num_engines=4, weight_bytes=4, weights_on_host=False, cache_bytes=0),
    episode=EpisodeLoad(
        num_samples=1000,
        prompt_tokens=1000,
        response_tokens=9000,
        num_steps=4,
        has_old_logprobs=False,
        has_reference=False,
        expert_bytes=0,
    ),
    transfer_bytes=0,
    num_processes=0,
)


def gigabytes(lines: tuple[BudgetLine, ...]) -> dict[str, float]:
    return {line.what: line.num_bytes / GB for line in lines}


def test_only_plain_initialisation_builds_a_whole_model_on_each_rank() -> None:
    plain = gigabytes(host_budget(LOAD))
    assert plain["policy_trainer: whole models until they are sharded"] == 8 * 4
    meta = gigabytes(host_budget(replace(LOAD, sharded=(replace(TRAINER, meta_init=True),))))
    assert not any(what.startswith("policy_trainer") for what in meta)


@pytest.mark.parametrize(("fsdp_size", "copies"), [(16, 0.5), (8, 1.0), (4, 2.0)])
def test_what_stays_on_the_host_is_this_nodes_share(fsdp_size: int, copies: float) -> None:
    found = gigabytes(host_budget(replace(LOAD, sharded=(replace(EVERYTHING_AT_HOME, fsdp_size=fsdp_size),))))
    assert found["policy_trainer: weights"] == copies * 4
    assert found["policy_trainer: gradients"] == copies * 4
    assert found["policy_trainer: moments of the optimizer"] == copies * 8
    assert found["policy_trainer: weights"] + found["policy_trainer: whole models until they are sharded"] == 8 * 4


def test_what_is_not_trained_has_no_gradient_and_no_moments() -> None:
    frozen = replace(EVERYTHING_AT_HOME, role="ref_policy", num_trained=0, meta_init=True)
    assert [what for what in gigabytes(host_budget(replace(LOAD, sharded=(frozen,)))) if "ref_policy" in what] == [
        "ref_policy: weights"
    ]


def test_what_is_saved_in_the_background_is_copied() -> None:
    """Every rank copies what it holds: 10**9 x (4 + 2 x 4) bytes, twice where the model is there twice."""
    copied = replace(TRAINER, copied_for_saving=True, fsdp_size=4)
    found = gigabytes(host_budget(replace(LOAD, sharded=(copied,))))
    assert found["policy_trainer: copy of weights and moments while they are saved"] == 24


def test_a_small_model_is_whole_on_every_rank() -> None:
    small = replace(EVERYTHING_AT_HOME, stays_gathered=True)
    assert (
        gigabytes(host_budget(replace(LOAD, sharded=(small,))))["policy_trainer: gathered weights and gradients"] == 64
    )


def test_engines_on_the_cpu_have_weights_and_a_cache_each() -> None:
    engine = replace(LOAD.engine, weights_on_host=True, cache_bytes=2 * GB)
    found = gigabytes(host_budget(replace(LOAD, engine=engine)))
    assert (found["engines: weights"], found["engines: keys and values"]) == (16, 8)


def test_an_episode_is_counted_by_token() -> None:
    """10 million tokens: 9 million answered ones at 12 bytes, samples at 13, a quarter of them packed twice at 33."""
    found = gigabytes(host_budget(LOAD))
    assert found["answers of an episode (object store)"] == pytest.approx(0.108)
    assert found["samples of an episode (driver)"] == pytest.approx(0.13)
    assert found["packed batch (driver and object store)"] == pytest.approx(2 * 2.5e6 * 33 / GB)
    scored = replace(LOAD.episode, has_old_logprobs=True, has_reference=True)
    found = gigabytes(host_budget(replace(LOAD, episode=scored)))
    assert found["samples of an episode (driver)"] == pytest.approx(0.21)
    assert found["packed batch (driver and object store)"] == pytest.approx(2 * 1e7 * 41 / GB)
    routed = gigabytes(host_budget(replace(LOAD, episode=replace(LOAD.episode, expert_bytes=384))))
    assert routed["answers of an episode (object store)"] == pytest.approx(0.108 + 3.84)


def test_loading_and_training_do_not_add_up() -> None:
    lines = (
        BudgetLine("a", 5, "start", "", ()),
        BudgetLine("b", 7, "episode", "", ()),
        BudgetLine("c", 2, "always", "", ()),
    )
    assert needed_bytes(lines) == 9
    assert budget_problem(lines, 9) is None
    assert budget_problem(lines, 8) is not None


def test_too_little_memory_is_one_message_with_the_cure() -> None:
    lines = host_budget(LOAD)
    assert budget_problem(lines, needed_bytes(lines)) is None
    message = budget_problem(lines, 16 * GB)
    assert message is not None
    assert message.startswith(
        "host memory: the run needs about 33.5 GB on this node while the models load, and 16.0 GB"
    )
    assert "whole models until they are sharded 32.0 GB (8 ranks x 1.00 G parameters x 4 bytes)" in message
    assert "models.policy_trainer.meta_init=True" in message
    meta = host_budget(replace(LOAD, sharded=(replace(TRAINER, meta_init=True),)))
    message = budget_problem(meta, 1_600_000_000)
    assert message is not None
    assert "during an episode" in message
    assert "runtime_args.sample_per_episode, models.policy.max_response_tokens_length" in message


def test_parameters_are_counted_from_headers(tmp_path: Path) -> None:
    weights = {"a.weight": torch.zeros(3, 4), "b.bias": torch.zeros(5)}
    save_file(weights | {"model.rotary_emb.inv_freq": torch.zeros(7)}, tmp_path / "one.safetensors")
    index = {"weight_map": dict.fromkeys([*weights, "model.rotary_emb.inv_freq"], "one.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert num_parameters(tmp_path) == 17
