"""What an engine is: seven verbs, single requests, answers that come out as they finish."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np

from chatlearn.errors import RunError
from chatlearn.records import Completion, IntStream
from chatlearn.weights.wire import TransferMessage, WireKind

WakePart = Literal["weights", "kv_cache"]

# What the weights in the model directory are called until a transfer brings others.
FIRST_VERSION = 0

# Name in ``runtime_args.rollout_backend`` -> where the class lives; imported only when chosen.
ENGINES: dict[str, str] = {
    "vllm": "chatlearn.rollout.vllm_engine:VllmEngine",
    "transformers": "chatlearn.rollout.tiny_engine:TransformersEngine",
}


@dataclass(frozen=True)
class EngineSpec:
    """Everything an engine is built from.

    ``max_model_len`` bounds prompt and answer together, in tokens. ``gpu_memory_utilization`` is for GPUs and
    ``kv_cache_bytes`` for the CPU, where a fraction of the free memory would change from start to start. ``replica`` is
    this engine's place among its equals. ``cpu_cores`` are the cores it may use, all tensor-parallel ranks together;
    empty means those of the process. With ``return_routed_experts`` every completion says where its tokens were routed;
    the model must be a mixture of experts.
    """

    model_path: str
    max_model_len: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    device_kind: Literal["cpu", "cuda"] = "cpu"
    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.8
    enforce_eager: bool = True
    kv_cache_bytes: int = 2**30
    seed: int = 0
    replica: int = 0
    wire: WireKind = "shared_memory"
    cpu_cores: tuple[int, ...] = ()
    trust_remote_code: bool = False
    sleep_enabled: bool = False
    return_routed_experts: bool = False


@dataclass(frozen=True)
class SamplingPlan:
    """How to sample. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 and ``min_p`` 0 truncate nothing.

    ``seed`` reseeds the engine as a whole when the requests are submitted, if nothing is in flight then: the same
    requests in the same order repeat exactly. ``None`` goes on with the engine's random stream.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024
    seed: int | None = None

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be sampled."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def reshapes(self) -> bool:
        """Whether answers come from another distribution than the one that the temperature alone shapes."""
        penalties = self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
        return penalties or self.truncates


@dataclass(frozen=True, eq=False)
class Request:
    """One answer that is wanted; ``request_id`` is unique among those in flight.

    ``begun`` is the part of the answer that is there already, perhaps from older weights: the engine goes on after it.
    """

    request_id: str
    prompt_token_ids: IntStream  # [P]
    begun: Completion | None = None

    def known_token_ids(self) -> IntStream:
        """What stands before the first token that is wanted: the prompt, and what there is of the answer."""
        if self.begun is None:
            return self.prompt_token_ids
        return np.concatenate([self.prompt_token_ids, self.begun.token_ids])


@dataclass(frozen=True, eq=False)
class Finished:
    """One answer that came out, whole: with what was begun before. An aborted one has the tokens that it had."""

    request_id: str
    completion: Completion


class RolloutEngine(Protocol):
    """Samples answers from weights that can be replaced while it lives.

    Law: every request that was submitted comes out of ``completions`` exactly once. The logprobs are those of the
    distribution that was sampled, that is after temperature, penalties and truncation. The routed experts of a token
    are those it met when it first went in, also when weights changed afterwards and its keys were computed anew.
    """

    def submit(self, requests: Sequence[Request], plan: SamplingPlan) -> None:
        """Queue requests; answers are computed while ``completions`` is being read."""
        ...

    def completions(self, patience_s: float = math.inf) -> Iterator[Finished]:
        """Yield answers as they finish, until nothing is in flight or so many seconds have passed.

        What is in flight stays so; the next call goes on. How the work is cut into calls changes no answer.
        """
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests now, to come out with the tokens they have; ids that are not in flight are ignored."""
        ...

    def load_weights(self, message: TransferMessage) -> None:
        """Take one message of a weight transfer. Raises ``WeightTransferError`` naming the tensor that is wrong.

        After such an error, or in the middle of an update, ``submit`` and ``completions`` refuse until a complete
        update has arrived.
        """
        ...

    def sleep(self) -> None:
        """Give the device's memory away, weights and cache; the weights must be sent again before sampling."""
        ...

    def wake(self, part: WakePart) -> None:
        """Take memory back: ``weights`` before a transfer, ``kv_cache`` before sampling."""
        ...

    def close(self) -> None:
        """End the engine and its processes."""
        ...


def require_room(requests: Sequence[Request], spec: EngineSpec) -> None:
    """Refuse a prompt that leaves no room for a single token of an answer."""
    for request in requests:
        num_known = len(request.known_token_ids())
        if num_known >= spec.max_model_len:
            raise RunError(
                f"request {request.request_id}: its prompt has {num_known} tokens and "
                f"max_model_len={spec.max_model_len} bounds prompt and answer together; drop long prompts or raise it"
            )


def build_engine(name: str, spec: EngineSpec) -> RolloutEngine:
    """Build the engine called ``name`` in ``ENGINES`` (or ``package.module:Class``), importing it only now."""
    module_name, _, class_name = ENGINES.get(name, name).partition(":")
    engine_class = vars(importlib.import_module(module_name))[class_name]
    # Classes named in the table have this protocol; one of a user's own is held to it by the engine contract test.
    return cast("RolloutEngine", engine_class(spec))
