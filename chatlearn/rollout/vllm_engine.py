"""vLLM behind the seven verbs, on CUDA and on the CPU.

With ``vllm_worker.py``, the only place that knows vLLM's inside. The engine core runs in this process and is stepped by
whoever reads ``completions``; start the process with ``environment.engine_environment``.
"""

from __future__ import annotations

import math
import os
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from chatlearn.errors import EngineFaultError, MissingExtraError, RunError, WeightTransferError
from chatlearn.records import Completion, ExpertStream, FinishReason, IntStream, VersionRun
from chatlearn.rollout.continuation import continued
from chatlearn.rollout.engine import (
    FIRST_VERSION,
    EngineSpec,
    Finished,
    Request,
    SamplingPlan,
    WakePart,
    require_room,
)
from chatlearn.weights.checkpoint_source import expected_tensors
from chatlearn.weights.ledger import ArrivalLedger
from chatlearn.weights.wire import BeginUpdate, FinishUpdate, OpenTransfer, TransferMessage, UpdateWeights

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

# The module named here registers our wires in every worker, each under this prefix in vLLM's factory.
WORKER_EXTENSION = "chatlearn.rollout.vllm_worker.WorkerExtension"
BACKEND_PREFIX = "chatlearn_"

# Level 1 would copy the weights to the host; they are sent again before they are used, so level 2 drops them.
SLEEP_LEVEL = 2


@dataclass(frozen=True)
class InFlight:
    """A request, and what vLLM calls it inside."""

    request: Request
    internal_id: str


class VllmEngine:
    """A ``RolloutEngine`` around one ``LLMEngine``."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.device_kind == "cpu" and spec.cpu_cores:
            os.sched_setaffinity(0, spec.cpu_cores)
        self._spec = spec
        self._ledger = ArrivalLedger(expected_tensors(spec.model_path), FIRST_VERSION)
        self._engine = start_vllm(spec)
        self._engine.set_weight_version(str(FIRST_VERSION))
        if spec.return_routed_experts and spec.device_kind == "cpu":
            self._rpc("chatlearn_capture_routes")
        # What is in flight, and what vLLM calls it inside.
        self._in_flight: dict[str, InFlight] = {}
        self._aborted: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    def submit(self, requests: Sequence[Request], plan: SamplingPlan) -> None:
        from vllm.inputs.engine import tokens_input

        self._ledger.require_complete()
        # vLLM takes requests in its sleep and never answers them.
        assert not (self._spec.sleep_enabled and self._engine.is_sleeping()), "its cache is asleep: wake it first"
        require_room(requests, self._spec)
        if plan.seed is not None and not self._in_flight:
            self._rpc("chatlearn_reseed", plan.seed)
        for request in requests:
            assert request.request_id not in self._in_flight, f"{request.request_id} is already in flight"
            prompt = tokens_input(request.known_token_ids().tolist())
            internal_id = self._engine.add_request(request.request_id, prompt, self._parameters(request, plan))
            self._in_flight[request.request_id] = InFlight(request, internal_id)

    def completions(self, patience_s: float = math.inf) -> Iterator[Finished]:
        until = time.monotonic() + patience_s
        while self._in_flight and time.monotonic() < until:
            while not self._aborted.empty():
                yield self._take(self._aborted.get())
            if self._in_flight:
                self._ledger.require_complete()
                for output in self._engine.step():
                    # Pooling outputs cannot occur: this engine only generates, and says only what is finished.
                    yield self._take(cast("RequestOutput", output))

    def abort(self, request_ids: Sequence[str]) -> None:
        known = [request_id for request_id in request_ids if request_id in self._in_flight]
        processor = self._engine.output_processor
        for request_id in known:
            for internal_id in processor.external_req_ids[request_id]:
                # vLLM hands the tokens so far to a request's queue when it aborts, and drops them without one.
                processor.request_states[internal_id].queue = cast("Any", self._aborted)
        self._engine.abort_request(known)

    def load_weights(self, message: TransferMessage) -> None:
        try:
            self._deliver(message)
        except WeightTransferError:
            self._abandon_update()
            raise
        except RuntimeError as error:
            if self._has_lost_a_worker():
                raise EngineFaultError(f"engine {self._spec.replica} lost one of its processes: {error}") from error
            # A worker in a process of its own reports whatever happened there as a RuntimeError with the text.
            self._abandon_update()
            raise WeightTransferError(f"engine {self._spec.replica}: {error}") from error

    def sleep(self) -> None:
        if self._spec.sleep_enabled and not self._engine.is_sleeping():
            assert not self._in_flight, "an engine with requests in flight cannot sleep"
            self._engine.sleep(SLEEP_LEVEL)
            self._ledger.lose()

    def wake(self, part: WakePart) -> None:
        if self._spec.sleep_enabled and self._engine.is_sleeping():
            self._engine.wake_up([part])

    def close(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def _deliver(self, message: TransferMessage) -> None:
        match message:
            case OpenTransfer(info):
                self._transfer("init_weight_transfer_engine", self._worker_info(info))
            case BeginUpdate(version):
                self._ledger.begin(version)
                self._transfer("start_weight_update")
            case UpdateWeights(info):
                self._ledger.enter(info)
                self._transfer("update_weights", dict(info))
            case FinishUpdate(version):
                self._ledger.finish(version)
                self._transfer("finish_weight_update")
                self._engine.set_weight_version(str(version))
                # Cached keys and values came from the old weights; running requests compute theirs anew.
                self._engine.reset_prefix_cache(reset_running_requests=True)

    def _worker_info(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Each replica's workers take their own ranks in an NCCL group, behind those of the replicas before it."""
        if "rank_offset" not in info:
            return dict(info)
        offset = self._spec.replica * self._spec.tensor_parallel_size
        return {**info, "rank_offset": info["rank_offset"] + offset}

    def _abandon_update(self) -> None:
        self._ledger.lose()
        self._rpc("chatlearn_abandon_update")

    def _has_lost_a_worker(self) -> bool:
        """Whether a process of a tensor-parallel rank died; vLLM itself then only says that it was cancelled."""
        if self._spec.tensor_parallel_size == 1:
            return False
        executor = cast("Any", self._engine.engine_core).engine_core.model_executor
        return executor.is_failed

    def _transfer(self, method: str, *arguments: object) -> None:
        """Call a verb of vLLM's weight transfer in every worker; what one of them complains of is raised here."""
        complaints = self._engine.collective_rpc("chatlearn_transfer", args=(method, arguments))
        for complaint in complaints:
            if complaint is not None:
                raise WeightTransferError(complaint)

    def _rpc(self, method: str, *arguments: object) -> None:
        self._engine.collective_rpc(method, args=arguments)

    def _parameters(self, request: Request, plan: SamplingPlan) -> SamplingParams:
        """What a request is sampled with; an engine that gives each of them a length of its own may add to this."""
        del request  # The plan decides.
        return sampling_params(plan)

    def _take(self, output: RequestOutput) -> Finished:
        taken = self._in_flight.pop(output.request_id)
        completion = self._completion(output, self._routes(taken.internal_id, output))
        return Finished(output.request_id, continued(taken.request.begun, completion, self._decode))

    def _decode(self, token_ids: IntStream) -> str:
        return self._engine.get_tokenizer().decode(token_ids.tolist(), skip_special_tokens=True)

    def _routes(self, internal_id: str, output: RequestOutput) -> ExpertStream | None:
        """Where the tokens of a finished request were routed, if that is wanted."""
        if not self._spec.return_routed_experts:
            return None
        if self._spec.device_kind == "cpu":
            return self._engine.collective_rpc("chatlearn_take_routes", args=(internal_id,))[0]
        routes = output.outputs[0].routed_experts
        if routes is None:  # aborted before its first token went in
            model = self._engine.model_config
            routes = np.zeros((0, model.get_total_num_hidden_layers(), model.get_num_experts_per_tok()), np.uint8)
        # vLLM's other type is unsigned; no model has so many experts that this matters.
        return cast("ExpertStream", routes if routes.dtype == np.uint8 else routes.astype(np.int16))

    def _completion(self, output: RequestOutput, routes: ExpertStream | None) -> Completion:
        answer = output.outputs[0]
        token_ids = np.asarray(answer.token_ids, dtype=np.int32)
        num_passed = len(output.prompt_token_ids or ()) + len(token_ids) - 1
        if routes is not None and answer.finish_reason != "abort" and len(routes) < num_passed:
            raise RunError(
                f"the engine told where {len(routes)} tokens of an answer were routed, of {num_passed} that passed its "
                "routers; set models.policy_trainer.router_replay=False"
            )
        # ``flat_logprobs`` with ``logprobs=0``: one number for each token, that of the token itself.
        logprobs = cast("Any", answer.logprobs).logprobs
        spans = answer.weight_versions or []
        return Completion(
            token_ids=token_ids,
            logprobs=np.asarray(logprobs, dtype=np.float32),
            text=self._decode(token_ids),
            finish_reason=cast("FinishReason", answer.finish_reason),
            versions=tuple(VersionRun(int(span.version), span.end - span.start) for span in spans),
            routed_experts=routes,
        )


def sampling_params(plan: SamplingPlan) -> SamplingParams:
    """One answer per request, the logprob of each sampled token, and nothing until it is finished.

    Seeds per request are left out: on the CPU they crash vLLM once chunked prefill splits a prompt.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=plan.temperature,
        top_p=plan.top_p,
        top_k=plan.top_k,
        min_p=plan.min_p,
        presence_penalty=plan.presence_penalty,
        frequency_penalty=plan.frequency_penalty,
        repetition_penalty=plan.repetition_penalty,
        max_tokens=plan.max_tokens,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def start_vllm(spec: EngineSpec) -> LLMEngine:
    """Load the model and allocate the cache; the process keeps the scheduler, TP ranks get processes of their own."""
    try:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except ModuleNotFoundError as error:
        raise MissingExtraError("vllm", extra=spec.device_kind) from error

    on_cpu = spec.device_kind == "cpu"
    arguments = EngineArgs(
        model=spec.model_path,
        trust_remote_code=spec.trust_remote_code,
        dtype=spec.dtype,
        seed=spec.seed,
        tensor_parallel_size=spec.tensor_parallel_size,
        distributed_executor_backend="mp" if spec.tensor_parallel_size > 1 else "uni",
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND_PREFIX + spec.wire),
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        enforce_eager=spec.enforce_eager,
        logprobs_mode="processed_logprobs",
        enable_sleep_mode=spec.sleep_enabled and not on_cpu,
        disable_log_stats=True,
        # A step must have ended before weights change, or its tokens would carry the wrong version.
        async_scheduling=False,
        generation_config="vllm",
    )
    if spec.return_routed_experts and on_cpu:
        # Our own capture sees only what passes the routers, and a compiled model does not call it.
        arguments.enable_prefix_caching = False
        arguments.enforce_eager = True
    elif spec.return_routed_experts:
        arguments.enable_return_routed_experts = True
    if on_cpu:
        # The fraction-of-memory key refuses to start when other processes have taken memory meanwhile.
        arguments.kv_cache_memory_bytes = spec.kv_cache_bytes
    else:
        arguments.gpu_memory_utilization = spec.gpu_memory_utilization
    return LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
