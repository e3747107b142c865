"""What every rollout engine must do, run against each of them; vLLM is started once, and once more with TP 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from routed_answers import check_routes
from tampering import Tampering, damage_third, drop_down_projection, end_too_early, flatten_first, rename_first
from torch import Tensor

from chatlearn.errors import ConfigError, RunError, WeightTransferError
from chatlearn.records import Completion
from chatlearn.rollout.engine import EngineSpec, Request, RolloutEngine, SamplingPlan, build_engine
from chatlearn.rollout.environment import engine_environment
from chatlearn.rollout.prove import OneEngine, prove_weight_transfer
from chatlearn.rollout.sampling import processed_logits
from chatlearn.weights.bucket import Bucket, unpacked
from chatlearn.weights.checkpoint_source import CheckpointSource
from chatlearn.weights.shared_memory import SharedMemorySender
from chatlearn.weights.wire import BeginUpdate, FinishUpdate, TensorMeta, WeightSource

# vLLM's own imports warn of torch's and Python's deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EMBEDDED = Path(__file__).parents[2] / "embedded"
MODEL = str(EMBEDDED / "tiny_qwen3")
SPEC = EngineSpec(MODEL, max_model_len=96, max_num_batched_tokens=2048, kv_cache_bytes=2**27)
FIRST = CheckpointSource(MODEL)


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest) -> Iterator[RolloutEngine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(SPEC).items():
            patch.setenv(name, value)
        # vLLM replaces this function on the CPU; the patch puts it back.
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        torch.set_num_threads(1)
        built = build_engine(request.param, SPEC)
        yield built
        built.close()


def question(index: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = f"What is {index + 13} + {2 * index + 8}?"
    chat = [{"role": "user", "content": text}]
    return np.asarray(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"], dtype=np.int32)


def questions(count: int) -> list[Request]:
    return [Request(f"q{index}", question(index)) for index in range(count)]


def answers(engine: RolloutEngine, requests: list[Request], plan: SamplingPlan) -> dict[str, Completion]:
    engine.submit(requests, plan)
    finished = list(engine.completions())
    assert sorted(item.request_id for item in finished) == sorted(request.request_id for request in requests)
    return {item.request_id: item.completion for item in finished}


def carry(engine: RolloutEngine, source: WeightSource, version: int) -> None:
    stats = SharedMemorySender(source, OneEngine(engine), rank=0, bucket_bytes=200_000).send(version)
    assert (stats.version, stats.num_tensors) == (version, len(FIRST.metadata()))


def next_logits(source: WeightSource, prompt: np.ndarray[Any, Any], completion: Completion) -> Tensor:
    """The oracle: a plain forward of a plain model with these weights; row i is what token i was sampled from."""
    config = transformers.AutoConfig.from_pretrained(MODEL)
    model = transformers.Qwen3ForCausalLM.from_pretrained(
        None, config=config, state_dict=dict(source.export_weights()), dtype="float32"
    )
    tokens = torch.from_numpy(np.concatenate([prompt, completion.token_ids])).long()
    with torch.inference_mode():
        return model(tokens[None]).logits[0, len(prompt) - 1 : -1].float()


def plain_logprobs(source: WeightSource, request: Request, completion: Completion, temperature: float = 1.0) -> Tensor:
    logits = next_logits(source, request.prompt_token_ids, completion) / temperature
    return logits.log_softmax(-1).gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]


def assert_close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Equal in fp32: 1e-5 on average; a token of probability 1e-3 carries the rounding of logits above 10."""
    gaps = np.abs(found - expected)
    assert gaps.mean() < 1e-5
    assert gaps.max() < 1e-4


class Perturbed:
    """The first weights with noise on every tensor, so that no tensor can be missing unseen."""

    def metadata(self) -> list[TensorMeta]:
        return FIRST.metadata()

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(5)
        for name, tensor in FIRST.export_weights():
            yield name, tensor + 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)


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


def test_a_prompt_without_room_for_an_answer_is_refused(engine: RolloutEngine) -> None:
    long = Request("long", np.full(96, 5, dtype=np.int32))
    with pytest.raises(RunError, match="request long: its prompt has 96 tokens and max_model_len=96"):
        engine.submit([long], SamplingPlan())
    assert list(engine.completions()) == []


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


def test_the_transformers_engine_tells_where_it_sent_every_token() -> None:
    """vLLM is asked the same below, where it runs a mixture of experts."""
    spec = EngineSpec(str(EMBEDDED / "tiny_qwen3_moe"), max_model_len=64, max_num_seqs=3, return_routed_experts=True)
    check_routes(build_engine("transformers", spec), spec)


def test_routes_of_a_model_without_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM has no experts whose routes could be returned"):
        build_engine("transformers", replace(SPEC, return_routed_experts=True))


def test_experts_on_two_tensor_parallel_ranks_use_what_they_are_sent_and_a_fault_is_named() -> None:
    spec = EngineSpec(
        str(EMBEDDED / "tiny_qwen3_moe"),
        max_model_len=64,
        tensor_parallel_size=2,
        kv_cache_bytes=2**26,
        cpu_cores=tuple(sorted(os.sched_getaffinity(0)))[:2],
        return_routed_experts=True,
    )
    program = [sys.executable, str(Path(__file__).with_name("prove_experts.py")), json.dumps(asdict(spec))]
    environment = os.environ | engine_environment(spec) | {"PYTHONPATH": str(EMBEDDED.parent)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [line for line in done.stdout.splitlines() if line.startswith(("proved", "caught", "healed"))]
    assert len(said) == 3, done.stdout[-2000:]
    fault = r"caught: model\.layers\.0\.mlp\.experts\S*: still has the kernel from before the update"
    assert re.match(fault, said[1]), said[1]
