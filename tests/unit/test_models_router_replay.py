"""Routing seen and replayed on one model in one process; across layouts and ranks it is tested with the trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.models.family import FAMILIES
from chatlearn.models.naming import ExpertLayout
from chatlearn.models.router_replay import (
    UNKNOWN,
    RouteRecorder,
    RouterTally,
    Routes,
    agreement,
    expert_dtype,
    routers_of,
    share_agreeing,
    watch_routers,
)

QWEN3_MOE = FAMILIES["Qwen3MoeForCausalLM"].experts
assert QWEN3_MOE is not None
NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_TOKENS = 3, 5, 2, 9


def tiny_model(
    *, device: str = "cpu", dtype: torch.dtype = torch.float32, experts: str = "grouped_mm", normalised: bool = True
) -> Any:
    """Experts in the first and the last layer only."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=16,
        norm_topk_prob=normalised,
        mlp_only_layers=[1],
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=experts)
    return model


def tokens(device: str = "cpu") -> torch.Tensor:
    return (torch.arange(NUM_TOKENS, device=device) * 7 % 31)[None]


def other_routes(seed: int = 0) -> torch.Tensor:
    """Distinct random experts, [T, L, K]."""
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(NUM_TOKENS * NUM_LAYERS)]
    return torch.from_numpy(np.array(chosen, dtype=np.int16)).view(NUM_TOKENS, NUM_LAYERS, TOP_K)


def routes_of(experts: torch.Tensor, *, replayed: bool = True) -> Routes:
    return Routes(experts, torch.ones(len(experts), dtype=torch.bool, device=experts.device), replayed=replayed)


def test_only_layers_with_experts_have_a_router() -> None:
    assert list(routers_of(tiny_model(device="meta"), QWEN3_MOE)) == [0, 2]


def test_a_family_whose_router_is_elsewhere_says_so() -> None:
    wrong = ExpertLayout("mlp.elsewhere", "", "", "", "", "")
    with pytest.raises(AssertionError, match=r"no module is called mlp\.elsewhere"):
        watch_routers(tiny_model(device="meta"), wrong)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_replaying_layer_is_the_weighted_sum_of_the_given_experts(*, normalised: bool) -> None:
    """Against the definition, one token and one expert at a time; the weights are the softmax over all experts."""
    model = tiny_model(normalised=normalised)
    watch_routers(model, QWEN3_MOE)
    block = model.model.layers[2].mlp
    seen: dict[str, torch.Tensor] = {}
    block.register_forward_hook(lambda _, inputs, output: seen.update(entering=inputs[0][0], leaving=output[0]))
    given = other_routes()
    with torch.no_grad():
        model(tokens(), routes=routes_of(given))
        probabilities = (seen["entering"] @ block.gate.weight.T).softmax(-1)
        for token, chosen in enumerate(given[:, 2].tolist()):
            weights = probabilities[token, chosen]
            expected = torch.zeros(32)
            for expert, weight in zip(chosen, weights / weights.sum() if normalised else weights, strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ seen["entering"][token]).chunk(2)
                expected += weight * (block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
            torch.testing.assert_close(seen["leaving"][token], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_replaying_what_was_recorded_changes_no_bit(*, normalised: bool) -> None:
    model = tiny_model(normalised=normalised)
    recorder = RouteRecorder(model, QWEN3_MOE)
    free = model(tokens()).logits
    recorded = recorder.latest(1)
    assert recorded.shape == (1, NUM_TOKENS, NUM_LAYERS, TOP_K)
    assert recorded.dtype == np.uint8
    watch_routers(model, QWEN3_MOE)
    routes = routes_of(torch.from_numpy(recorded[0]).to(torch.int16))
    assert torch.equal(model(tokens(), routes=routes).logits, free)
    assert not torch.equal(model(tokens(), routes=routes_of(other_routes())).logits, free)
    assert torch.equal(model(tokens()).logits, free), "routes do not outlive their forward"


def test_unknown_routes_leave_the_choice_to_the_router() -> None:
    model = tiny_model()
    watch_routers(model, QWEN3_MOE)
    free = model(tokens()).logits
    nothing = torch.full((NUM_TOKENS, NUM_LAYERS, TOP_K), UNKNOWN, dtype=torch.int16)
    tally = RouterTally()
    routes = routes_of(nothing)
    tally.add(routes)
    assert torch.equal(model(tokens(), routes=routes).logits, free)
    assert share_agreeing(tally.sums(torch.device("cpu"))) is None
    # A token after the last known one is free; attention looks back only, so those before it do not notice.
    partly = other_routes()
    partly[-1] = UNKNOWN
    changed = model(tokens(), routes=routes_of(other_routes())).logits[0]
    mixed = model(tokens(), routes=routes_of(partly)).logits[0]
    torch.testing.assert_close(mixed[:-1], changed[:-1], rtol=1e-5, atol=1e-6)
    assert (mixed[-1] - changed[-1]).abs().max() > 1e-3


def test_routes_that_are_only_watched_change_nothing_and_are_compared() -> None:
    model = tiny_model()
    recorder = RouteRecorder(model, QWEN3_MOE)
    watch_routers(model, QWEN3_MOE)
    free = model(tokens()).logits
    own, given = torch.from_numpy(recorder.latest(1)[0]), other_routes()
    routes, tally = routes_of(given, replayed=False), RouterTally()
    tally.add(routes)
    assert torch.equal(model(tokens(), routes=routes).logits, free)
    expected = [
        int(choice) in own[token, layer].tolist()
        for token in range(NUM_TOKENS)
        for layer in (0, 2)
        for choice in given[token, layer]
    ]
    assert 0 < sum(expected) < len(expected)
    assert share_agreeing(tally.sums(torch.device("cpu"))) == sum(expected) / len(expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4))
def test_agreement_is_the_size_of_the_common_part(seed: int, num_tokens: int, top_k: int) -> None:
    generator = np.random.default_rng(seed)
    given, own = (np.array([generator.permutation(7)[:top_k] for _ in range(num_tokens)]) for _ in range(2))
    known, counted = (generator.random(num_tokens) < 0.7 for _ in range(2))
    told = np.where(known[:, None], given, UNKNOWN)
    compared = [token for token in range(num_tokens) if known[token] and counted[token]]
    common = sum(len(set(given[token]) & set(own[token])) for token in compared)
    found = agreement(torch.from_numpy(told), torch.from_numpy(own), torch.from_numpy(counted))
    assert found.tolist() == [common, len(compared) * top_k]


def test_routes_of_another_model_are_refused() -> None:
    model = tiny_model()
    watch_routers(model, QWEN3_MOE)
    with pytest.raises(AssertionError, match="for a router of"):
        model(tokens(), routes=routes_of(other_routes()[:, :, :1]))


def test_numbers_of_experts_take_one_byte_where_they_fit() -> None:
    assert (expert_dtype(256), expert_dtype(257)) == (np.uint8, np.int16)


@pytest.mark.parametrize("replayed", [True, False])
def test_grouped_experts_never_wait_for_a_number(*, replayed: bool) -> None:
    """Forward and backward of a whole model run where tensors have no values, so nothing can have asked for one.

    On a GPU, to ask is to wait until everything before has been computed. The shapes of grouped products are known for
    bfloat16 only.
    """
    model = tiny_model(device="meta", dtype=torch.bfloat16)
    watch_routers(model, QWEN3_MOE)
    routes, tally = routes_of(other_routes().to("meta"), replayed=replayed), RouterTally()
    tally.add(routes)
    model.model(tokens("meta"), routes=routes).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())
    assert tally.sums(torch.device("meta")).shape == (2,)


def test_eager_experts_do_wait() -> None:
    """The law above would hold for a model that leaves its experts out."""
    with pytest.raises(NotImplementedError, match="nonzero"):
        tiny_model(device="meta", dtype=torch.bfloat16, experts="eager").model(tokens("meta"))
