"""The law of an engine that returns routed experts, for any engine on any mixture; also run in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chatlearn.models.family import family_of
from chatlearn.models.router_replay import RouteRecorder
from chatlearn.records import Completion, ExpertStream
from chatlearn.rollout.engine import EngineSpec, Request, RolloutEngine, SamplingPlan
from chatlearn.rollout.prove import OneEngine
from chatlearn.rollout.tiny_engine import load_model, replace_weights
from chatlearn.weights.checkpoint_source import CheckpointSource
from chatlearn.weights.shared_memory import SharedMemorySender
from chatlearn.weights.wire import TensorMeta

# Two kernels round differently, so one token in a thousand may lie near enough to a tie.
SHARE_EQUAL = 0.999

# Above that of any proof that ran before.
NOISY_VERSION = 9


class NoisyWeights:
    """The stored weights with noise on each, which sends many tokens elsewhere."""

    def __init__(self, model_path: str) -> None:
        self._source = CheckpointSource(model_path)

    def metadata(self) -> list[TensorMeta]:
        return self._source.metadata()

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(5)
        for name, tensor in self._source.export_weights():
            yield name, tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)


def plain_routes(model: Any, spec: EngineSpec, prompt: np.ndarray, completion: Completion) -> ExpertStream:
    """What the routers of a plain model choose for all tokens but the last, [P + C - 1, L, K]."""
    experts = family_of(Path(spec.model_path)).experts
    assert experts is not None
    recorder = RouteRecorder(model, experts)
    tokens = np.concatenate([prompt, completion.token_ids])[:-1]
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(tokens).long()[None])
    return recorder.latest(1)[0]


def assert_same_routes(found: ExpertStream | None, expected: ExpertStream) -> None:
    """Equal as sets, but for a tie or two."""
    assert found is not None
    assert (found.dtype, found.shape) == (np.uint8, expected.shape)
    assert np.mean(np.sort(found) == np.sort(expected)) >= SHARE_EQUAL


def check_routes(engine: RolloutEngine, spec: EngineSpec) -> None:
    """Every token comes with the experts it met when it first went in, also where the weights changed on the way.

    The engine must hold the stored weights; it is left with others.
    """
    generator = np.random.default_rng(1)
    quick, *slow = [Request(f"r{n}", generator.integers(0, 300, 5 + 9 * n).astype(np.int32)) for n in range(4)]
    prompts = {request.request_id: request.prompt_token_ids for request in (quick, *slow)}
    engine.submit([quick], SamplingPlan(max_tokens=2, seed=3))
    engine.submit(slow, SamplingPlan(max_tokens=20))
    finished = engine.completions()
    completions = [next(finished)]
    noisy = NoisyWeights(spec.model_path)
    SharedMemorySender(noisy, OneEngine(engine), rank=0, bucket_bytes=2**20).send(NOISY_VERSION)
    completions += list(finished)

    before = load_model(spec)
    after = replace_weights(load_model(spec), dict(noisy.export_weights()), spec)
    assert any(len(item.completion.versions) > 1 for item in completions)
    for item in completions:
        prompt, completion = prompts[item.request_id], item.completion
        old, new = (plain_routes(model, spec, prompt, completion) for model in (before, after))
        # The last token that the old weights sampled goes in first under the new ones.
        num_sampled = sum(run.num_tokens for run in completion.versions if run.version != NOISY_VERSION)
        num_old = len(prompt) + num_sampled - 1 if num_sampled else 0
        assert_same_routes(completion.routed_experts, np.concatenate([old[:num_old], new[num_old:]]))
        assert np.mean(np.sort(old) == np.sort(new)) < SHARE_EQUAL, "the noise must send tokens elsewhere"
