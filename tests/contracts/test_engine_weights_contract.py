"""What every rollout engine must do with weights, run against each of them; vLLM is started once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from engines import (
    FIRST,
    MODEL,
    SPEC,
    Perturbed,
    answers,
    assert_close,
    carry,
    plain_logprobs,
    questions,
)
from tampering import Tampering, damage_third, drop_down_projection, end_too_early, flatten_first, rename_first
from torch import Tensor

from chatlearn.errors import WeightTransferError
from chatlearn.rollout.engine import RolloutEngine, SamplingPlan
from chatlearn.rollout.prove import prove_weight_transfer
from chatlearn.rollout.vllm_engine import VllmEngine
from chatlearn.weights.bucket import Bucket, unpacked
from chatlearn.weights.shared_memory import SharedMemorySender
from chatlearn.weights.wire import BeginUpdate, FinishUpdate

# vLLM's own imports warn of torch's and Python's deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_new_weights_are_the_ones_that_are_sampled_and_versions_say_so(engine: RolloutEngine) -> None:
    requests, plan = questions(4), SamplingPlan(max_tokens=24, seed=7)
    before = answers(engine, requests, plan)
    carry(engine, Perturbed(), version=8)
    during = answers(engine, requests, plan)
    carry(engine, FIRST, version=9)
    after = answers(engine, requests, plan)
    for request in requests:
        name = request.request_id
        expected = plain_logprobs(Perturbed(), request, during[name])
        assert_close(during[name].logprobs, expected.numpy())
        assert np.array_equal(before[name].token_ids, after[name].token_ids)
        assert_close(before[name].logprobs, after[name].logprobs)
        assert [run.version for run in during[name].versions] == [8]
        assert [run.version for run in after[name].versions] == [9]
    assert any(not np.array_equal(before[name].token_ids, during[name].token_ids) for name in before)


def test_an_answer_that_spans_an_update_says_which_tokens_came_from_which_weights(engine: RolloutEngine) -> None:
    carry(engine, FIRST, version=10)
    quick, slow = questions(2)
    engine.submit([quick], SamplingPlan(max_tokens=2, seed=11))
    engine.submit([slow], SamplingPlan(max_tokens=20))
    stream = engine.completions()
    assert next(stream).request_id == quick.request_id
    carry(engine, Perturbed(), version=11)
    (item,) = list(stream)
    carry(engine, FIRST, version=12)

    runs = item.completion.versions
    assert [run.version for run in runs] == [10, 11]
    assert sum(run.num_tokens for run in runs) == len(item.completion.token_ids)
    expected = torch.cat(
        [
            plain_logprobs(FIRST, slow, item.completion)[: runs[0].num_tokens],
            plain_logprobs(Perturbed(), slow, item.completion)[runs[0].num_tokens :],
        ]
    )
    assert_close(item.completion.logprobs, expected.numpy())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop_down_projection, r"did not bring model\.layers\.2\.mlp\.down_proj\.weight"),
        (rename_first, r"model\.nothing\.weight: the engine does not expect"),
        (flatten_first, r"model\.\S+: shape \(\d+,\) arrived and the engine expects \(\d+, \d+\)"),
        (damage_third, r"model\.\S+: the bytes that arrived are not those that were sent"),
        (end_too_early, r"update 13 ended while update None"),
    ],
)
def test_a_faulty_update_names_the_tensor_and_a_whole_one_heals(
    engine: RolloutEngine, change: Any, complaint: str
) -> None:
    requests, plan = questions(2), SamplingPlan(max_tokens=8, seed=12)
    before = answers(engine, requests, plan)
    with pytest.raises(WeightTransferError, match=complaint):
        SharedMemorySender(Perturbed(), Tampering(engine, change), rank=0, bucket_bytes=200_000).send(13)
    with pytest.raises(WeightTransferError, match="incomplete"):
        engine.submit(requests, plan)
    carry(engine, FIRST, version=14)
    after = answers(engine, requests, plan)
    for name, completion in before.items():
        assert_close(completion.logprobs, after[name].logprobs)


def test_nothing_is_sampled_in_the_middle_of_an_update(engine: RolloutEngine) -> None:
    engine.load_weights(BeginUpdate(15))
    with pytest.raises(WeightTransferError, match="incomplete"):
        engine.submit(questions(1), SamplingPlan())
    with pytest.raises(WeightTransferError, match="did not bring"):
        engine.load_weights(FinishUpdate(15))
    carry(engine, FIRST, version=16)


def test_the_proof_passes(engine: RolloutEngine) -> None:
    prove_weight_transfer(engine, MODEL)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_vllms_own_fault_with_tied_heads_is_named_at_the_first_transfer(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("chatlearn.rollout.vllm_worker.repack_heads", lambda model: None)
        with pytest.raises(WeightTransferError, match="lm_head: still has the kernel from before the update"):
            carry(engine, FIRST, version=17)
    carry(engine, FIRST, version=18)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
@pytest.mark.parametrize("left_out", ["k_proj.weight", "q_norm.weight"])
def test_what_vllm_leaves_out_by_itself_is_named(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    def without(bucket: Bucket, memory: Tensor) -> list[tuple[str, Tensor]]:
        return [pair for pair in unpacked(bucket, memory) if not pair[0].endswith(left_out)]

    with monkeypatch.context() as patch:
        patch.setattr("chatlearn.rollout.vllm_worker.unpacked", without)
        with pytest.raises(
            WeightTransferError, match=r"qkv_proj: vLLM loaded \d+ of|q_norm\.weight: vLLM did not load"
        ):
            carry(engine, FIRST, version=16)
    carry(engine, FIRST, version=17)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_the_proof_finds_it_where_nobody_knew_what_to_look_for(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("chatlearn.rollout.vllm_worker.repack_heads", lambda model: None)
        patch.setattr("chatlearn.rollout.vllm_worker.packed_kernels", lambda model: {})
        with pytest.raises(WeightTransferError, match="equivalent weights changed its logprobs"):
            prove_weight_transfer(engine, MODEL)
    carry(engine, FIRST, version=19)  # the failed proof left the engine with changed weights
    prove_weight_transfer(engine, MODEL)


def test_sleep_and_wake_are_harmless_where_nothing_can_sleep(engine: RolloutEngine) -> None:
    requests, plan = questions(2), SamplingPlan(max_tokens=8, seed=17)
    before = answers(engine, requests, plan)
    engine.sleep()
    engine.wake("weights")
    engine.wake("kv_cache")
    after = answers(engine, requests, plan)
    assert all(np.array_equal(before[name].token_ids, after[name].token_ids) for name in before)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_sleep_drops_the_weights_and_waking_takes_two_steps(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's worker on the CPU keeps its memory; everything above it does what it would do on a GPU."""
    inside = cast("VllmEngine", engine)
    executor = cast("Any", inside._engine.engine_core).engine_core.model_executor
    told: list[tuple[str, Any]] = []
    carry_out = executor.collective_rpc

    def listen(method: Any, *arguments: Any, **options: Any) -> Any:
        if method in ("sleep", "wake_up"):
            told.append((method, options["kwargs"]))
        return carry_out(method, *arguments, **options)

    monkeypatch.setattr(executor, "collective_rpc", listen)
    monkeypatch.setattr(inside, "_spec", replace(SPEC, sleep_enabled=True))
    requests, plan = questions(2), SamplingPlan(max_tokens=8, seed=18)
    before = answers(engine, requests, plan)
    engine.sleep()
    engine.sleep()
    with pytest.raises(WeightTransferError, match="incomplete"):
        engine.submit(requests, plan)
    engine.wake("weights")
    with pytest.raises(WeightTransferError, match="incomplete"):
        engine.submit(requests, plan)
    carry(engine, FIRST, version=18)
    with pytest.raises(AssertionError, match="its cache is asleep"):
        engine.submit(requests, plan)
    engine.wake("kv_cache")
    after = answers(engine, requests, plan)
    assert told == [("sleep", {"level": 2}), ("wake_up", {"tags": ["weights"]}), ("wake_up", {"tags": ["kv_cache"]})]
    for name, completion in before.items():
        assert np.array_equal(completion.token_ids, after[name].token_ids)
        assert {run.version for run in after[name].versions} == {18}
