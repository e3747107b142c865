"""Causes in how the model is computed: kernels, the experts that tokens are sent to, the number format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from chatlearn.numerics.bench import Bench
from chatlearn.numerics.change import Change
from chatlearn.numerics.gap import differences, gap_of
from chatlearn.numerics.verdict import MOST_OF_IT, Trial

# Two implementations in the same narrow format share about half of their rounding errors: that of the weights, and of
# the first layers. Seen: a correlation of 0.77 to 0.90 with a bfloat16 engine, and half of the gap gone.
SHARED_ROUNDING = 0.5
LEFT_OF_ROUNDING = 0.8


def kernels(bench: Bench) -> Iterator[Trial]:
    """The trainer's packed attention, or its grouped experts, compute something else than transformers' own."""
    if bench.facts.shares_sequences:
        return
    what = "attention or experts" if bench.facts.is_mixture else "attention"
    yield Trial(
        "attention kernel",
        "the trainer with transformers' own kernels, one answer at a time",
        f"the trainer's packed {what} computes something else than transformers' own, with which it agrees with "
        "the engine",
        "set models.policy_trainer.packing=False and models.policy_trainer.groupgemm=False, and report this with the "
        "versions in manifest.json: a kernel of this torch does not do what it should on this device",
        bench.gap_with(Change(plain_kernels=True)),
    )


def router(bench: Bench) -> Iterator[Trial]:
    """In a mixture of experts, engine and trainer send tokens to different experts."""
    if not bench.facts.is_mixture or any(sample.routed_experts is None for sample in bench.samples):
        return
    replays = bench.facts.replays_routes
    gap = bench.gap_with(Change(replays_routes=not replays))
    yield Trial(
        "router",
        "the trainer with experts of its own choice" if replays else "the trainer with the experts the engine chose",
        "the engine reports other experts than it took"
        if replays
        else "engine and trainer send tokens to different experts",
        "set models.policy_trainer.router_replay=False and report this with the versions in manifest.json"
        if replays
        else "set models.policy_trainer.router_replay=True, so that the trainer takes the engine's choices",
        gap,
        proven=gap.mean <= MOST_OF_IT * bench.gap.mean,
    )


def number_format(bench: Bench) -> Iterator[Trial]:
    """The engine computes in another number format than the trainer.

    Two implementations never round alike, so the gap does not vanish. What tells is that the engine is off in the same
    direction, token by token, as the trainer is when it changes its format.
    """
    own = bench.facts.dtype
    other = "bfloat16" if own == "float32" else "float32"
    streams = bench.score(bench.samples, Change(dtype=other))
    left = differences(bench.samples, streams)
    rounding = differences(
        [replace(s, rollout_logprobs=o) for s, o in zip(bench.samples, streams, strict=True)], bench.own
    )
    gap = gap_of(left)
    yield Trial(
        "number format",
        f"the trainer in {other}",
        f"the engine computes in {other} and the trainer in {own}",
        "give engine and trainer the same number format: float32 on the CPU, bfloat16 on CUDA; the engine gets it as "
        "EngineSpec.dtype",
        gap,
        proven=gap.mean <= LEFT_OF_ROUNDING * bench.gap.mean and correlation(bench.apart, rounding) >= SHARED_ROUNDING,
    )


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Of two series; 0 where one of them is constant."""
    if not (np.std(left) > 0 and np.std(right) > 0):
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
