"""Proof, before a run depends on it, that an engine computes with the weights it is sent.

A checksum proves bytes, not use: vLLM repacks weights after loading, and its CPU build has had two faults there, in
experts and in tied heads, that raise nothing and sample nonsense. So the model itself is the witness, without another
implementation to compare with:

1. sending the weights the engine already has leaves its logprobs as they are;
2. so does sending *equivalent* weights: almost every tensor is scaled by a power of two that a neighbour takes back,
   and the vocabulary is renumbered. One stale or half-loaded tensor breaks the balance;
3. a change that is not balanced changes the logprobs;
4. sending the first weights again restores them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from chatlearn.errors import WeightTransferError
from chatlearn.models.family import family_of
from chatlearn.models.naming import EMBEDDING
from chatlearn.models.naming import TIED_HEAD as HEAD
from chatlearn.rollout.engine import FIRST_VERSION, Request, RolloutEngine, SamplingPlan
from chatlearn.weights.checkpoint_source import CheckpointSource
from chatlearn.weights.shared_memory import SharedMemorySender
from chatlearn.weights.wire import TensorMeta, TransferMessage, WeightSource

FINAL_NORM = "model.norm.weight"

# By the end of a name. Per block: the norm doubles its output and what reads it halves; values and the up projection
# then quadruple, and what reads those takes a quarter; queries double against halved keys where both are normalised.
# Powers of two commute with rounding, so that the outputs are equal to the bit in every float format.
BALANCED_FACTORS: Mapping[str, float] = {
    "input_layernorm.weight": 2.0,
    "q_proj.weight": 0.5,
    "k_proj.weight": 0.5,
    "v_proj.weight": 2.0,
    "v_proj.bias": 4.0,
    "o_proj.weight": 0.25,
    "q_norm.weight": 2.0,
    "k_norm.weight": 0.5,
    "post_attention_layernorm.weight": 2.0,
    "mlp.gate.weight": 0.5,
    "gate_proj.weight": 0.5,
    "up_proj.weight": 2.0,
    "up_proj.bias": 4.0,
    "down_proj.weight": 0.25,
}
# A head of its own takes the final norm's factor back; a tied one cannot, so there only step 3 watches that norm.
BALANCED_HEAD_FACTORS: Mapping[str, float] = {FINAL_NORM: 2.0, HEAD: 0.5}
HALVED_NORM: Mapping[str, float] = {FINAL_NORM: 0.5}

# Enough to pass through most experts of a mixture, and few enough to take a blink.
NUM_PROBES = 16
PROBE_TOKENS = 24
MAX_TIES = 2
PROBE_PLAN = SamplingPlan(temperature=0.0, max_tokens=4)

# The likeliest tokens after a probe, with their logprobs; of all probes, by request.
Steps = list[tuple[int, float]]
Testimony = dict[str, Steps]


class ChangedWeights:
    """A ``WeightSource`` that scales tensors by the end of their names and renumbers the vocabulary.

    Token t of ``source`` is token t - ``shift`` here, in the embedding and in a head of its own.
    """

    def __init__(self, source: WeightSource, factors: Mapping[str, float], shift: int) -> None:
        self._source = source
        self._factors = factors
        self._shift = shift

    def metadata(self) -> list[TensorMeta]:
        return self._source.metadata()

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._source.export_weights():
            factors = [factor for ending, factor in self._factors.items() if name.endswith(ending)]
            scaled = tensor * factors[0] if factors else tensor
            yield name, scaled.roll(-self._shift, dims=0) if name in {EMBEDDING, HEAD} else scaled


class OneEngine:
    """An ``EngineClient`` for an engine in this process."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def send(self, message: TransferMessage) -> None:
        self._engine.load_weights(message)


def prove_weight_transfer(engine: RolloutEngine, model_path: str, tolerance: float = 1e-5) -> None:
    """Raise ``WeightTransferError`` unless the engine, just started from ``model_path``, uses what it is sent.

    For the shared-memory wire, with nothing in flight. Four transfers; afterwards the engine has the weights it was
    started with, as ``FIRST_VERSION``. ``tolerance`` is in nats: 1e-5 for float32.
    """
    source = CheckpointSource(model_path)
    shapes = {meta.name: meta.shape for meta in source.metadata()}
    vocabulary = shapes[EMBEDDING][0]
    factors = {**BALANCED_FACTORS, **(BALANCED_HEAD_FACTORS if HEAD in shapes else {})}
    client = OneEngine(engine)

    def testimony_with(weights: WeightSource, shift: int = 0) -> Testimony:
        SharedMemorySender(weights, client, rank=0).send(FIRST_VERSION)
        return question(engine, vocabulary, shift)

    # Memory that lies elsewhere may be added up in another order: a router whose choices are nearly equal turns then.
    num_excused = MAX_TIES if family_of(Path(model_path)).experts is not None else 0

    def expect_equal(what: str, after: Testimony) -> None:
        changed = difference(before, after, num_excused)
        if not changed <= tolerance:
            raise WeightTransferError(
                f"the engine does not compute with the weights it is sent: {what} changed its logprobs by "
                f"{changed:.1e} (tolerance {tolerance:.0e}); this engine cannot be trained with"
            )

    before = question(engine, vocabulary, shift=0)
    expect_equal("the weights it already has", testimony_with(source))
    expect_equal("equivalent weights", testimony_with(ChangedWeights(source, factors, shift=1), shift=1))
    changed = difference(before, testimony_with(ChangedWeights(source, HALVED_NORM, shift=0)), num_excused)
    if changed <= tolerance:
        raise WeightTransferError(f"{FINAL_NORM}: halving it changed the engine's logprobs by {changed:.1e} only")
    expect_equal("its first weights again", testimony_with(source))


def question(engine: RolloutEngine, vocabulary: int, shift: int) -> Testimony:
    """Ask for the likeliest few tokens after fixed nonsense prompts, in the numbering of the unchanged weights."""
    prompts = np.random.default_rng(0).integers(vocabulary, size=(NUM_PROBES, PROBE_TOKENS), dtype=np.int32)
    renumbered = (prompts - shift) % vocabulary
    engine.submit([Request(f"probe.{index}", prompt) for index, prompt in enumerate(renumbered)], PROBE_PLAN)
    return {
        item.request_id: list(
            zip(
                ((item.completion.token_ids + shift) % vocabulary).tolist(),
                item.completion.logprobs.tolist(),
                strict=True,
            )
        )
        for item in engine.completions()
    }


def difference(before: Testimony, after: Testimony, num_excused: int = 0) -> float:
    """The largest difference of a logprob, up to and including the first token at which a probe's answers part.

    As many probes as are excused may differ as they like. Infinite where too many probes part: tokens that are equally
    likely may change places, and hardly ever do; and where a probe is answered with something that is no number.
    """
    gaps = sorted(_gap(steps, after[request_id]) for request_id, steps in before.items())
    num_parted = sum(_parts(steps, after[request_id]) for request_id, steps in before.items())
    if num_parted > MAX_TIES or gaps[-1] == math.inf:
        return math.inf
    return gaps[len(gaps) - 1 - num_excused]


def _gap(steps: Steps, others: Steps) -> float:
    largest = 0.0
    # An end-of-sequence token may come earlier where the vocabulary is renumbered.
    for (token_id, logprob), (other_id, other) in zip(steps, others, strict=False):
        gap = abs(logprob - other)
        largest = max(largest, gap if math.isfinite(gap) else math.inf)
        if token_id != other_id:
            break
    return largest


def _parts(steps: Steps, others: Steps) -> bool:
    return any(one != other for (one, _), (other, _) in zip(steps, others, strict=False))
