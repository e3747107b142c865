"""A small engine on plain transformers, for tests, for debugging in one process, and for understanding.

All answers in flight advance together by one token, as rows of one left-padded batch with a key-value cache.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor

from chatlearn.errors import ConfigError, WeightTransferError
from chatlearn.models.family import family_of
from chatlearn.models.router_replay import RouteRecorder
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
from chatlearn.rollout.sampling import processed_logits
from chatlearn.weights.checkpoint_source import expected_tensors
from chatlearn.weights.ledger import ArrivalLedger
from chatlearn.weights.shared_memory import read_bucket
from chatlearn.weights.wire import BeginUpdate, FinishUpdate, OpenTransfer, TransferMessage, UpdateWeights


@dataclass(eq=False)
class Answer:
    """One answer while it grows: a token, its logprob and the version that gave it, appended together.

    ``routes`` are the experts of the tokens that went in, in pieces of [tokens, L, K]; empty where nobody records.
    """

    request: Request
    plan: SamplingPlan
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    versions: list[int] = field(default_factory=list[int])
    routes: list[ExpertStream] = field(default_factory=list[ExpertStream])

    def tokens_so_far(self) -> list[int]:
        """Prompt and answer."""
        return [*self.request.known_token_ids().tolist(), *self.token_ids]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows in step: their answers, the cache of all tokens but the newest, and which of the cached are no padding."""

    answers: list[Answer]
    cache: Any  # transformers' Cache; its classes are untyped
    mask: Tensor  # [B, cached]


class TransformersEngine:
    """A ``RolloutEngine`` that samples from a transformers model; takes the shared-memory wire only."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.wire != "shared_memory":
            raise ConfigError(f"the transformers engine takes weights through shared memory, not through {spec.wire!r}")
        self._spec = spec
        self._device = torch.device(spec.device_kind)
        self._ledger = ArrivalLedger(expected_tensors(spec.model_path), FIRST_VERSION)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(spec.model_path)
        self._model = load_model(spec)
        self._recorder = recorder_of(self._model, spec)
        self._end_ids = end_token_ids(self._model, self._tokenizer)
        self._generator = torch.Generator(self._device).manual_seed(spec.seed)
        self._waiting: deque[Answer] = deque()
        self._batch = Batch([], None, torch.empty(0))
        self._aborted: deque[Answer] = deque()
        self._received: dict[str, Tensor] = {}

    def submit(self, requests: Sequence[Request], plan: SamplingPlan) -> None:
        self._ledger.require_complete()
        require_room(requests, self._spec)
        if plan.seed is not None and not self._in_flight():
            self._generator.manual_seed(plan.seed)
        self._waiting.extend(Answer(request, plan) for request in requests)

    def completions(self, patience_s: float = math.inf) -> Iterator[Finished]:
        until = time.monotonic() + patience_s
        while self._in_flight() and time.monotonic() < until:
            while self._aborted:
                yield self._finished(self._aborted.popleft(), "abort")
            if self._waiting or self._batch.answers:
                yield from self._step(self._ledger.require_complete())

    def abort(self, request_ids: Sequence[str]) -> None:
        unwanted = set(request_ids)
        self._requeue()
        self._aborted.extend(answer for answer in self._waiting if answer.request.request_id in unwanted)
        self._waiting = deque(answer for answer in self._waiting if answer.request.request_id not in unwanted)

    def load_weights(self, message: TransferMessage) -> None:
        try:
            self._take(message)
        except WeightTransferError:
            self._ledger.lose()
            raise

    def sleep(self) -> None:
        """The model is small; it stays where it is."""

    def wake(self, part: WakePart) -> None:
        """Nothing slept."""

    def close(self) -> None:
        """There are no processes to end."""

    def _in_flight(self) -> bool:
        return bool(self._waiting or self._aborted or self._batch.answers)

    def _take(self, message: TransferMessage) -> None:
        match message:
            case OpenTransfer():
                pass
            case BeginUpdate(version):
                self._ledger.begin(version)
                self._received = {}
            case UpdateWeights(info):
                self._ledger.enter(info)
                self._received.update(read_bucket(info))
            case FinishUpdate(version):
                self._ledger.finish(version)
                self._model = replace_weights(self._model, self._received, self._spec)
                self._recorder = recorder_of(self._model, self._spec)
                self._received = {}
                self._requeue()

    def _requeue(self) -> None:
        """Let running answers wait again, in their order; they go on where they were, from keys computed anew."""
        self._waiting.extendleft(reversed(self._batch.answers))
        self._batch = Batch([], None, torch.empty(0))

    @torch.inference_mode()
    def _step(self, version: int) -> list[Finished]:
        """Advance every answer by one token; return those that are complete."""
        if self._waiting and len(self._batch.answers) < self._spec.max_num_seqs:
            self._requeue()
            room = min(self._spec.max_num_seqs, len(self._waiting))
            logits, batch = self._prefill([self._waiting.popleft() for _ in range(room)])
        else:
            logits, batch = self._decode(self._batch)
        self._keep_routes(batch.answers)
        for answer, row in zip(batch.answers, logits, strict=True):
            self._sample(answer, row, version)
        reasons: list[FinishReason | None] = [self._finish_reason(answer) for answer in batch.answers]
        self._batch = keep_rows(batch, [index for index, reason in enumerate(reasons) if reason is None])
        return [
            self._finished(answer, reason)
            for answer, reason in zip(batch.answers, reasons, strict=True)
            if reason is not None
        ]

    def _prefill(self, answers: list[Answer]) -> tuple[Tensor, Batch]:
        """Run whole sequences, padded on the left; logits [B, V] of the next token."""
        sequences = [answer.tokens_so_far() for answer in answers]
        longest = max(map(len, sequences))
        padded = [[0] * (longest - len(tokens)) + tokens for tokens in sequences]
        mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in sequences])
        return self._forward(torch.tensor(padded), Batch(answers, transformers.DynamicCache(), mask))

    def _decode(self, batch: Batch) -> tuple[Tensor, Batch]:
        """Run the newest token of each row."""
        newest = torch.tensor([[answer.token_ids[-1]] for answer in batch.answers])
        grown = torch.cat([batch.mask, torch.ones_like(newest)], dim=1)
        return self._forward(newest, Batch(batch.answers, batch.cache, grown))

    def _forward(self, token_ids: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
        positions = (batch.mask.cumsum(1) - 1).clamp(min=0)[:, -token_ids.shape[1] :]
        outputs = self._model(
            input_ids=token_ids.to(self._device),
            attention_mask=batch.mask.to(self._device),
            position_ids=positions.to(self._device),
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1].float(), batch

    def _keep_routes(self, answers: list[Answer]) -> None:
        """Before a token is sampled: add the routes of the tokens that went in for the first time."""
        if self._recorder is None:
            return
        for answer, routes in zip(answers, self._recorder.latest(len(answers)), strict=True):
            num_fresh = len(answer.tokens_so_far()) - sum(map(len, answer.routes))
            answer.routes.append(routes[len(routes) - num_fresh :])

    def _sample(self, answer: Answer, logits: Tensor, version: int) -> None:
        prompt = torch.from_numpy(answer.request.prompt_token_ids).to(self._device, torch.int64)
        known = answer.tokens_so_far()[len(prompt) :]
        generated = torch.tensor(known, dtype=torch.int64, device=self._device)
        logprobs = processed_logits(logits, prompt, generated, answer.plan).log_softmax(-1)
        if answer.plan.temperature == 0:
            token_id = int(logprobs.argmax())
        else:
            token_id = int(torch.multinomial(logprobs.exp(), 1, generator=self._generator))
        answer.token_ids.append(token_id)
        answer.logprobs.append(float(logprobs[token_id]))
        answer.versions.append(version)

    def _finish_reason(self, answer: Answer) -> FinishReason | None:
        if answer.token_ids[-1] in self._end_ids:
            return "stop"
        full = len(answer.tokens_so_far()) >= self._spec.max_model_len
        return "length" if full or len(answer.token_ids) >= answer.plan.max_tokens else None

    def _finished(self, answer: Answer, reason: FinishReason) -> Finished:
        runs = tuple(VersionRun(version, len(list(tokens))) for version, tokens in groupby(answer.versions))
        token_ids = np.asarray(answer.token_ids, dtype=np.int32)
        completion = Completion(
            token_ids=token_ids,
            logprobs=np.asarray(answer.logprobs, dtype=np.float32),
            text=self._text(token_ids),
            finish_reason=reason,
            versions=runs,
            routed_experts=None if self._recorder is None else self._recorder.joined(answer.routes),
        )
        return Finished(answer.request.request_id, continued(answer.request.begun, completion, self._text))

    def _text(self, token_ids: IntStream) -> str:
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)


def keep_rows(batch: Batch, rows: list[int]) -> Batch:
    """The batch without the rows that are finished."""
    if len(rows) == len(batch.answers):
        return batch
    if not rows:
        return Batch([], None, torch.empty(0))
    batch.cache.batch_select_indices(torch.tensor(rows))
    return Batch([batch.answers[row] for row in rows], batch.cache, batch.mask[rows])


def load_model(spec: EngineSpec) -> Any:
    """The model in the directory, ready to sample."""
    # A bar for every update would fill the screen.
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        spec.model_path, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code
    )
    return model.to(spec.device_kind).eval()


def recorder_of(model: Any, spec: EngineSpec) -> RouteRecorder | None:
    """Who writes down where the model's routers send tokens, where that is wanted."""
    if not spec.return_routed_experts:
        return None
    family = family_of(Path(spec.model_path))
    if family.experts is None:
        raise ConfigError(f"{spec.model_path}: {family.architecture} has no experts whose routes could be returned")
    return RouteRecorder(model, family.experts)


def replace_weights(model: Any, tensors: dict[str, Tensor], spec: EngineSpec) -> Any:
    """The same model with other weights, given by their names in a checkpoint; transformers fuses what it must."""
    fresh: Any = type(model).from_pretrained(None, config=model.config, state_dict=tensors, dtype=spec.dtype)
    return fresh.to(spec.device_kind).eval()


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation configuration."""
    configured = cast("int | list[int] | None", model.generation_config.eos_token_id)
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token_id for token_id in [tokenizer.eos_token_id, *several] if token_id is not None)
