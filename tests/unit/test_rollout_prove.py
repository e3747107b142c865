"""The proof passes for an engine that uses what it is sent, and names the fault of one that does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chatlearn.errors import WeightTransferError
from chatlearn.rollout.engine import EngineSpec, Finished, Request, SamplingPlan, WakePart
from chatlearn.rollout.prove import (
    BALANCED_FACTORS,
    BALANCED_HEAD_FACTORS,
    EMBEDDING,
    FINAL_NORM,
    Testimony,
    difference,
    prove_weight_transfer,
)
from chatlearn.rollout.tiny_engine import TransformersEngine
from chatlearn.weights.checkpoint_source import CheckpointSource
from chatlearn.weights.wire import TransferMessage

EMBEDDED = Path(__file__).parents[2] / "embedded"
FAMILIES = ["tiny_qwen3", "tiny_qwen3_moe"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class EngineWithStaleTensor:
    """A faithful engine, except that one tensor keeps its first value: what a fault in repacking looks like."""

    def __init__(self, spec: EngineSpec, stale: str) -> None:
        self._engine = TransformersEngine(spec)
        self._stale = stale
        self._first: dict[str, Tensor] = dict(CheckpointSource(spec.model_path).export_weights())

    def submit(self, requests: Sequence[Request], plan: SamplingPlan) -> None:
        self._engine.submit(requests, plan)

    def completions(self, patience_s: float = math.inf) -> Iterator[Finished]:
        return self._engine.completions(patience_s)

    def abort(self, request_ids: Sequence[str]) -> None:
        self._engine.abort(request_ids)

    def load_weights(self, message: TransferMessage) -> None:
        self._engine.load_weights(message)
        received = self._engine._received
        if self._stale in received:
            received[self._stale] = self._first[self._stale]

    def sleep(self) -> None: ...

    def wake(self, part: WakePart) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("family", FAMILIES)
def test_proof_passes_for_an_engine_that_loads(family: str) -> None:
    spec = EngineSpec(str(EMBEDDED / family), 64)
    prove_weight_transfer(TransformersEngine(spec), spec.model_path)


@pytest.mark.parametrize(
    ("family", "stale"),
    [
        ("tiny_qwen3", "model.embed_tokens.weight"),
        ("tiny_qwen3", "model.norm.weight"),
        ("tiny_qwen3", "model.layers.2.self_attn.k_norm.weight"),
        ("tiny_qwen3", "model.layers.3.mlp.down_proj.weight"),
        ("tiny_qwen3_moe", "model.embed_tokens.weight"),
        ("tiny_qwen3_moe", "lm_head.weight"),
        ("tiny_qwen3_moe", "model.norm.weight"),
        ("tiny_qwen3_moe", "model.layers.1.mlp.gate.weight"),
        ("tiny_qwen3_moe", "model.layers.1.mlp.experts.5.up_proj.weight"),
    ],
)
def test_proof_fails_where_a_single_tensor_stays_stale(family: str, stale: str) -> None:
    spec = EngineSpec(str(EMBEDDED / family), 64)
    engine = EngineWithStaleTensor(spec, stale)
    with pytest.raises(WeightTransferError, match=r"logprobs"):
        prove_weight_transfer(engine, spec.model_path)


class EngineWithStaleHead(TransformersEngine):
    """Its head is tied to the embedding and yet computes with the first embedding: a packed copy nobody renewed."""

    def load_weights(self, message: TransferMessage) -> None:
        first = self._model.lm_head.weight
        super().load_weights(message)
        self._model.lm_head.weight = first


def test_proof_fails_where_a_tied_head_stays_stale() -> None:
    spec = EngineSpec(str(EMBEDDED / "tiny_qwen3"), 64)
    with pytest.raises(WeightTransferError, match="equivalent weights changed its logprobs"):
        prove_weight_transfer(EngineWithStaleHead(spec), spec.model_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_is_witnessed(family: str) -> None:
    witnessed = (*BALANCED_FACTORS, *BALANCED_HEAD_FACTORS, FINAL_NORM, EMBEDDING)
    names = [meta.name for meta in CheckpointSource(EMBEDDED / family).metadata()]
    assert [name for name in names if not name.endswith(witnessed)] == []


def answers_off_by(**gaps: float) -> Testimony:
    """Answers of one token to eight probes; some are off."""
    return {f"probe.{number}": [(7, -1.0 + gaps.get(f"probe_{number}", 0.0))] for number in range(8)}


def test_a_router_that_turns_at_a_tie_is_excused_and_a_fault_is_not() -> None:
    """A tie is met by a probe or two; a weight that is not used by nearly all."""
    turned = answers_off_by(probe_1=5e-3, probe_6=2e-4)
    assert difference(answers_off_by(), turned) == pytest.approx(5e-3), "a dense model has no routers"
    assert difference(answers_off_by(), turned, num_excused=2) == 0
    assert difference(answers_off_by(), turned, num_excused=1) == pytest.approx(2e-4)
    assert difference(answers_off_by(), answers_off_by(probe_3=float("nan")), num_excused=2) == float("inf")
    parted = {name: [(number, -1.0)] for number, name in enumerate(answers_off_by())}
    assert difference(answers_off_by(), parted, num_excused=2) == float("inf")
