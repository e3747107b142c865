"""What every rollout engine must do with questions, run against each of them; vLLM is started once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from engines import (
    EMBEDDED,
    FIRST,
    MODEL,
    SPEC,
    Perturbed,
    answers,
    assert_close,
    carry,
    next_logits,
    plain_logprobs,
    questions,
)
from routed_answers import check_routes

from chatlearn.errors import ConfigError, RunError
from chatlearn.rollout.engine import EngineSpec, Request, RolloutEngine, SamplingPlan, build_engine
from chatlearn.rollout.sampling import processed_logits

# vLLM's own imports warn of torch's and Python's deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_every_request_comes_out_once_with_consistent_streams(engine: RolloutEngine) -> None:
    completions = answers(engine, questions(12), SamplingPlan(max_tokens=16, seed=1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert {c.finish_reason for c in completions.values()} == {"stop", "length"}
    for completion in completions.values():
        assert completion.token_ids.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        assert len(completion.logprobs) == len(completion.token_ids) == sum(r.num_tokens for r in completion.versions)
        ended = completion.token_ids[-1] == tokenizer.eos_token_id
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == 16
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_logprobs_agree_with_a_plain_forward(engine: RolloutEngine, temperature: float) -> None:
    requests = questions(4)
    completions = answers(engine, requests, SamplingPlan(temperature=temperature, max_tokens=24, seed=2))
    for request in requests:
        completion = completions[request.request_id]
        expected = plain_logprobs(FIRST, request, completion, temperature)
        assert_close(completion.logprobs, expected.numpy())


@pytest.mark.parametrize(
    "plan",
    [
        SamplingPlan(temperature=1.3, top_p=0.8),
        SamplingPlan(temperature=1.3, top_k=3),
        SamplingPlan(temperature=1.3, min_p=0.2),
        SamplingPlan(repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=0.3),
        SamplingPlan(temperature=0.0),
    ],
)
def test_logprobs_are_those_of_the_processed_distribution(engine: RolloutEngine, plan: SamplingPlan) -> None:
    requests = questions(2)
    completions = answers(engine, requests, replace(plan, max_tokens=10, seed=3))
    for request in requests:
        completion = completions[request.request_id]
        prompt, tokens = (torch.from_numpy(ids).long() for ids in (request.prompt_token_ids, completion.token_ids))
        for position, logits in enumerate(next_logits(FIRST, request.prompt_token_ids, completion)):
            expected = processed_logits(logits, prompt, tokens[:position], plan).log_softmax(-1)[tokens[position]]
            assert float(completion.logprobs[position]) == pytest.approx(float(expected), abs=1e-4)
            if plan.temperature == 0:
                assert tokens[position] == logits.argmax()


def test_answers_come_out_as_they_finish_and_an_aborted_one_keeps_its_tokens(engine: RolloutEngine) -> None:
    slow, quick = questions(2)
    engine.submit([slow], SamplingPlan(temperature=1.0, max_tokens=60, seed=4, min_p=0.0))
    engine.submit([quick], SamplingPlan(max_tokens=1))
    stream = engine.completions()
    first = next(stream)
    assert first.request_id == quick.request_id
    engine.abort([slow.request_id, "never submitted"])
    (rest,) = list(stream)
    assert (rest.request_id, rest.completion.finish_reason) == (slow.request_id, "abort")
    assert 1 <= len(rest.completion.token_ids) <= 3
    assert len(rest.completion.logprobs) == len(rest.completion.token_ids)
    assert sum(run.num_tokens for run in rest.completion.versions) == len(rest.completion.token_ids)
    assert list(engine.completions()) == []


def test_the_same_seed_and_requests_repeat_exactly(engine: RolloutEngine) -> None:
    plan = SamplingPlan(max_tokens=24, seed=5)
    first, again, other = (answers(engine, questions(8), replace(plan, seed=seed)) for seed in (5, 5, 6))
    for name, completion in first.items():
        assert np.array_equal(completion.token_ids, again[name].token_ids)
        assert np.array_equal(completion.logprobs, again[name].logprobs)
    assert any(not np.array_equal(first[name].token_ids, other[name].token_ids) for name in first)


def test_how_the_work_is_cut_into_calls_changes_no_answer(engine: RolloutEngine) -> None:
    """An engine whose driver asks for little at a time is seen to hang; its answers must be the same."""
    requests, plan = questions(6), SamplingPlan(max_tokens=24, seed=6)
    whole = answers(engine, requests, plan)
    engine.submit(requests, plan)
    assert list(engine.completions(patience_s=0.0)) == [], "no time, no work"
    pieces, num_calls = [], 0
    while len(pieces) < len(requests):
        pieces += engine.completions(patience_s=1e-4)
        num_calls += 1
    assert num_calls > 3
    assert list(engine.completions()) == []
    for item in pieces:
        assert np.array_equal(item.completion.token_ids, whole[item.request_id].token_ids)
        assert np.array_equal(item.completion.logprobs, whole[item.request_id].logprobs)


def test_an_answer_that_was_begun_goes_on_and_comes_out_whole(engine: RolloutEngine) -> None:
    carry(engine, FIRST, version=6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    requests = questions(4)
    begun = answers(engine, requests, SamplingPlan(max_tokens=7, seed=8))
    unfinished = [request for request in requests if begun[request.request_id].finish_reason == "length"]
    assert unfinished, "all answers are shorter than the budget: nothing to go on with"
    carry(engine, Perturbed(), version=7)
    going_on = [replace(request, begun=begun[request.request_id]) for request in unfinished]
    whole = answers(engine, going_on, SamplingPlan(max_tokens=9))
    carry(engine, FIRST, version=8)
    for request in unfinished:
        first, completion = begun[request.request_id], whole[request.request_id]
        assert np.array_equal(completion.token_ids[:7], first.token_ids)
        assert np.array_equal(completion.logprobs[:7], first.logprobs)
        assert 8 <= len(completion.token_ids) <= 16
        assert [(run.version, run.num_tokens) for run in completion.versions] == [
            (6, 7),
            (7, len(completion.token_ids) - 7),
        ]
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        expected = plain_logprobs(Perturbed(), request, completion)[7:]
        assert_close(completion.logprobs[7:], expected.numpy())


def test_a_prompt_without_room_for_an_answer_is_refused(engine: RolloutEngine) -> None:
    long = Request("long", np.full(96, 5, dtype=np.int32))
    with pytest.raises(RunError, match="request long: its prompt has 96 tokens and max_model_len=96"):
        engine.submit([long], SamplingPlan())
    assert list(engine.completions()) == []


def test_the_transformers_engine_tells_where_it_sent_every_token() -> None:
    """vLLM is asked the same below, where it runs a mixture of experts."""
    spec = EngineSpec(str(EMBEDDED / "tiny_qwen3_moe"), max_model_len=64, max_num_seqs=3, return_routed_experts=True)
    check_routes(build_engine("transformers", spec), spec)


def test_routes_of_a_model_without_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM has no experts whose routes could be returned"):
        build_engine("transformers", replace(SPEC, return_routed_experts=True))
