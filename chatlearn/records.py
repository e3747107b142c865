"""The values that travel through a run. Records are frozen, born whole, and never changed afterwards.

Streams of numbers are numpy arrays (int32 token ids, float32 numbers, bool masks) because thousands of answers cross
process borders in every episode. Alignment: in every record of this file entry *i* of a stream describes token *i*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

IntStream = NDArray[np.int32]
FloatStream = NDArray[np.float32]
BoolStream = NDArray[np.bool_]
# [F, layers, choices per token]: numbers of experts, in the smallest type that holds them all.
ExpertStream = NDArray[np.uint8 | np.int16]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question as the engine sees it, with what is needed to judge an answer.

    ``uid`` is unique within a run's data, ``text`` is the prompt after the chat template, ``source`` the record's
    ``data_source``, ``answer`` its ground truth.
    """

    uid: str
    token_ids: IntStream  # [P]
    text: str
    source: str
    answer: str


@dataclass(frozen=True)
class VersionRun:
    """``num_tokens`` consecutive completion tokens that were sampled from the weights called ``version``."""

    version: int
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Completion:
    """One answer: its tokens, the engine's log-probability of each, and the weights each was sampled from.

    ``versions`` covers every token in order: ``sum(run.num_tokens) == len(token_ids)``. A completion that ended with
    an end-of-sequence token includes that token.

    ``routed_experts`` tells, where the engine was asked for it, to which experts each layer sent the first F tokens of
    prompt **and** answer when they went in; layers are all decoder layers, and what stands for a dense one means
    nothing. F is usually P + C - 1, because the last token of an answer never goes in.
    """

    token_ids: IntStream  # [C]
    logprobs: FloatStream  # [C]
    text: str
    finish_reason: FinishReason
    versions: tuple[VersionRun, ...]
    routed_experts: ExpertStream | None = None  # [F, L, K]


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt with all its completions: the group over which GRPO compares."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class Score:
    """What a reward function thinks of one completion.

    ``error`` tells that the grader itself failed (deadline, crash): such a completion is neither right nor wrong; it is
    counted, shown and left out of training. ``parts`` are named components of the value, for the journal.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Graded:
    """A rollout with one score per completion, in the same order."""

    rollout: Rollout
    scores: tuple[Score, ...]


@dataclass(frozen=True, eq=False)
class OpenGroup:
    """A prompt that was asked and that is not learned from, or not to the end: what a checkpoint keeps of it.

    ``finished`` answers wait to be learned from, ``begun`` ones are gone on with, and what is missing is asked anew.
    ``scores`` are those of all answers that were judged, the ones learned from already first. ``version`` names the
    weights that were published when the prompt was asked; ``round`` counts the rounds that its answers have had.
    """

    prompt: Prompt
    finished: tuple[Completion, ...] = ()
    begun: tuple[Completion, ...] = ()
    scores: tuple[Score, ...] = ()
    version: int = 0
    round: int = 0


@dataclass(frozen=True, eq=False)
class Sample:
    """One completion as the trainer sees it: prompt and completion tokens in one stream of length T.

    ``loss_mask`` is True on tokens to train, which are the completion's. The other streams are zero on the prompt.
    ``old_logprobs`` are the trainer's own before the first step of the episode; ``None`` when the step computes them
    itself. ``ref_logprobs`` are the frozen reference model's; ``None`` without one. ``routed_experts`` are the
    completion's, for the first F of the T tokens.
    """

    prompt_uid: str
    token_ids: IntStream  # [T]
    loss_mask: BoolStream  # [T]
    rollout_logprobs: FloatStream  # [T]
    advantages: FloatStream  # [T]
    old_logprobs: FloatStream | None = None  # [T]
    ref_logprobs: FloatStream | None = None  # [T]
    routed_experts: ExpertStream | None = None  # [F, L, K]


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step reports; every mean is over the loss tokens of the whole batch, on all ranks.

    ``rollout_logprob_diff_*`` compare the engine's log-probabilities with the trainer's on the same tokens;
    ``rollout_kl`` is the k3 estimate of KL(rollout || trainer) in nats per token. ``router_agreement`` is the share of
    the engine's choices of an expert that the trainer's routers, with the current weights, make too; ``None`` where
    the engine told no choices. ``correction_*`` are about the weights that correct for another distribution in the
    engine: effective sample size as a share of the loss tokens, share of loss tokens that weigh nothing, mean weight;
    ``None`` without a correction.
    """

    loss: float
    pg_loss: float
    kl_loss: float
    entropy: float
    grad_norm: float
    clip_fraction: float
    lr: float
    num_tokens: int  # all tokens that went through the model
    num_loss_tokens: int
    rollout_logprob_diff_mean: float
    rollout_logprob_diff_max: float
    rollout_kl: float
    router_agreement: float | None = None
    correction_ess: float | None = None
    correction_masked_ratio: float | None = None
    correction_weight_mean: float | None = None
