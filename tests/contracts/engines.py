"""The engine under test, the questions it is asked, and an oracle: a plain forward of a plain model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from chatlearn.records import Completion
from chatlearn.rollout.engine import EngineSpec, Request, RolloutEngine, SamplingPlan
from chatlearn.rollout.prove import OneEngine
from chatlearn.weights.checkpoint_source import CheckpointSource
from chatlearn.weights.shared_memory import SharedMemorySender
from chatlearn.weights.wire import TensorMeta, WeightSource

EMBEDDED = Path(__file__).parents[2] / "embedded"
MODEL = str(EMBEDDED / "tiny_qwen3")
SPEC = EngineSpec(MODEL, max_model_len=96, max_num_batched_tokens=2048, kv_cache_bytes=2**27)
FIRST = CheckpointSource(MODEL)


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
