"""Scores of a model with one thing changed, for the diagnosis of a trainer and an engine that disagree.

The model itself is never changed: other weights and other number formats are tried on a twin, which is made when it is
first asked for and costs the memory of a frozen model.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chatlearn.algorithm.truncation import Truncation, truncated_logprobs
from chatlearn.models.attention import PACKED_ATTENTION
from chatlearn.models.lora import without_adapter
from chatlearn.trainer.load import held_rows
from chatlearn.trainer.sharded_model import ShardedModel

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from chatlearn.batch.pack import MicroBatch
    from chatlearn.device import DtypeName
    from chatlearn.numerics.change import Change, Distribution, OtherWeights
    from chatlearn.trainer.parallel import ParallelPlan
    from chatlearn.trainer.token_scorer import TokenScorer


class Rescorer:
    """Scores as the model would, if something were different; collective, like the model's own methods."""

    def __init__(self, model: ShardedModel, plan: ParallelPlan) -> None:
        self._model = model
        self._plan = plan
        self._twins: dict[DtypeName, Twin] = {}

    def logprobs(self, micro_batches: Sequence[MicroBatch], change: Change) -> list[Tensor]:
        """Log-probability of each label with ``change``, one float32 [T] on the host per micro-batch."""
        model = self._model
        if change.dtype is not None or change.weights is not None:
            model = self._twin(change.dtype or model.spec.compute_dtype).dressed(self._model, change.weights)
        if change.replays_routes is not None:
            spec = replace(model.spec, router_replay=change.replays_routes)
            model = ShardedModel(spec, model.family, model.module, model.sequence)
        with ExitStack() as changes:
            if change.distribution is not None:
                changes.enter_context(reading(model.module, change.distribution))
            if change.plain_kernels:
                changes.enter_context(plain_kernels(model))
            return model.logprobs(micro_batches)

    def _twin(self, dtype: DtypeName) -> Twin:
        if dtype not in self._twins:
            self._twins[dtype] = Twin(self._model, self._plan, dtype)
        return self._twins[dtype]

    def close(self) -> None:
        """Let the twins go."""
        self._twins = {}


class Twin:
    """A frozen model from the same directory, sharded alike, that takes over any of the model's weights."""

    def __init__(self, model: ShardedModel, plan: ParallelPlan, dtype: DtypeName) -> None:
        spec = replace(model.spec, compute_dtype=dtype, meta_init=True)
        self._model = ShardedModel.load(spec, plan, trainable=False)
        self._stored = {name: held_rows(weight)[0].cpu().clone() for name, weight in self._weights()}

    @torch.no_grad()
    def dressed(self, model: ShardedModel, others: OtherWeights | None) -> ShardedModel:
        """The twin with the weights of ``model``, but for ``others``."""
        for (name, weight), (_, current) in zip(self._weights(), model.module.named_parameters(), strict=True):
            ours = held_rows(weight)[0]
            if others is None or not (others.names is None or without_adapter(name) in others.names):
                ours.copy_(held_rows(current)[0])
            elif others.source == "stored":
                ours.copy_(self._stored[name])
            else:
                ours.zero_()
        return self._model

    def _weights(self) -> list[tuple[str, Tensor]]:
        return list(self._model.module.named_parameters())


@contextmanager
def reading(scorer: TokenScorer, distribution: Distribution) -> Generator[None]:
    """Inside, the scorer reads log-probabilities of another distribution from the same logits."""
    temperature, read = scorer.temperature, scorer.read
    scorer.temperature = distribution.temperature
    if distribution.is_truncated:
        truncation = Truncation(distribution.top_p, distribution.top_k, distribution.min_p)
        scorer.read = partial(truncated_logprobs, truncation=truncation)
    try:
        yield
    finally:
        scorer.temperature, scorer.read = temperature, read


@contextmanager
def plain_kernels(model: ShardedModel) -> Generator[None]:
    """Inside, the backbone computes with transformers' own plain kernels; sequences must come one at a time."""
    backbone = model.module.model
    experts = "grouped_mm" if model.spec.grouped_experts else "eager"
    backbone.set_attn_implementation("eager")
    if model.family.experts is not None:
        backbone.set_experts_implementation("eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation(PACKED_ATTENTION)
        if model.family.experts is not None:
            backbone.set_experts_implementation(experts)
