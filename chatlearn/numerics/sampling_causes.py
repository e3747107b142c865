"""Causes in what is sampled from: the temperature, and what is cut off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from chatlearn.numerics.bench import Bench
from chatlearn.numerics.change import Change, Distribution
from chatlearn.numerics.gap import differences, gap_of
from chatlearn.numerics.verdict import Trial
from chatlearn.records import FloatStream

RAW = Distribution(1.0)

# Odds of a thousand to one that answers were sampled from one distribution and not from the other.
DECISIVE = math.log(1000)

# Where to begin the search for a temperature; about a quarter apart, because the gap has one valley.
TEMPERATURES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5, 1.9, 2.4, 3.0)
# Each step leaves 0.62 of the interval, so these leave a thousandth; who writes a temperature rounds it.
GOLDEN_STEPS = 14
GOLDEN = (math.sqrt(5) - 1) / 2

# Renormalising what is left makes every sampled token likelier; noise, which half precision has beside it, has both
# signs.
ONE_SIGNED = 0.5
LEAST_SHARE = 1e-5
SHARE_STEPS = 24


def raw_or_temperature(bench: Bench) -> Iterator[Trial]:
    """The engine's numbers are those of temperature 1, and either its samples are too, or only its numbers."""
    asked = bench.facts.asked
    if asked == RAW:
        return
    streams = bench.score(bench.samples, Change(distribution=RAW))
    gap = gap_of(differences(bench.samples, streams))
    change = f"the trainer at {RAW}"
    odds = _log_odds(bench, streams)
    numbers = f"the engine's numbers are of {RAW}, not of {asked}"
    report = "let the engine report processed log-probabilities (vLLM: logprobs_mode=processed_logprobs)"
    obey = "let the engine obey its sampling plan; models.policy.temperature is what is trained for"
    if odds <= -DECISIVE:
        yield Trial("raw log-probabilities", change, f"{numbers}, and its answers were sampled as asked", report, gap)
    elif odds >= DECISIVE:
        yield Trial("temperature", change, f"{numbers}, and so were its answers sampled", obey, gap)
    else:
        doubt = f"{numbers}; whether its answers are too cannot be told from so few"
        yield Trial("temperature or raw log-probabilities", change, doubt, f"{report}; or {obey}", gap)


def _log_odds(bench: Bench, raw: Sequence[FloatStream]) -> float:
    """The logarithm of how much likelier the answers are at temperature 1 than as asked.

    Whatever the answers' lengths depend on: had they been sampled as asked, the odds would exceed a thousand at most
    once in a thousand times (a ratio of likelihoods has the mean 1 then), and the other way round.
    """
    return sum(
        float((ours[sample.loss_mask].astype(np.float64) - own[sample.loss_mask]).sum())
        for sample, ours, own in zip(bench.samples, raw, bench.own, strict=True)
    )


def written_elsewhere(bench: Bench) -> Iterator[Trial]:
    """The engine samples by a plan that is written in another place: for evaluation, or with the model."""
    for place, distribution in bench.facts.known_distributions:
        yield Trial(
            "truncated sampling" if distribution.is_truncated else "temperature",
            f"the trainer at {distribution}",
            f"the engine samples at {distribution}, as {place} says, not at {bench.facts.asked}",
            "let the engine obey the sampling plan of training and nothing else (vLLM: generation_config=vllm)",
            bench.gap_with(Change(distribution=distribution)),
        )


def other_temperature(bench: Bench) -> Iterator[Trial]:
    """The engine samples at a temperature that nobody wrote down."""

    def trial(temperature: float) -> Trial:
        distribution = Distribution(temperature)
        return Trial(
            "temperature",
            f"the trainer at {distribution}",
            f"the engine's numbers are of {distribution}, not of {bench.facts.asked}",
            "let the engine obey its sampling plan, and set models.policy.temperature to what is meant",
            bench.gap_with(Change(distribution=distribution)),
        )

    gaps: list[float] = []
    for temperature in TEMPERATURES:
        attempt = trial(temperature)
        gaps.append(attempt.gap.mean)
        yield attempt
    if not min(gaps) <= bench.gap.mean / 2:
        return  # No valley: it is something else.
    best = int(np.argmin(gaps))
    low, high = TEMPERATURES[max(best - 1, 0)], TEMPERATURES[min(best + 1, len(gaps) - 1)]
    found = _valley(lambda temperature: bench.gap_with(Change(distribution=Distribution(temperature))).mean, low, high)
    for digits in (2, 3):
        yield trial(round(found, digits))
    yield trial(found)


def _valley(height: Callable[[float], float], low: float, high: float) -> float:
    """Where the function is lowest, by golden section; it has one valley between ``low`` and ``high``."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = height(left), height(right)
    for _ in range(GOLDEN_STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = height(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = height(right)
    return (low + high) / 2


def truncated(bench: Bench) -> Iterator[Trial]:
    """Tokens are cut off: what is left is made likelier, everywhere, and each way to cut has its own traces."""
    if not bench.apart.sum() >= ONE_SIGNED * np.abs(bench.apart).sum():
        return
    temperature = bench.facts.asked.temperature
    # A nucleus is the smallest set that reaches top_p, so the least mass that was kept cuts as top_p did.
    least_kept = math.exp(-bench.gap.largest)
    yield _cut(bench, Distribution(temperature, top_p=least_kept * (1 - 1e-5)))[0]
    yield from _halving_counts(bench)
    yield from _halving_shares(bench, lambda share: Distribution(temperature, min_p=share))
    if bench.facts.dtype != "float32":  # Rounding hides the least mass that was kept.
        yield from _halving_shares(bench, lambda share: Distribution(temperature, top_p=1 - share))


def _halving_counts(bench: Bench) -> Iterator[Trial]:
    """Find top_k by bisection: a larger one cuts less."""
    low, high = 1, bench.facts.vocabulary
    while low < high:
        middle = (low + high) // 2
        trial, is_too_much = _cut(bench, Distribution(bench.facts.asked.temperature, top_k=middle))
        yield trial
        low, high = (middle + 1, high) if is_too_much else (low, middle)


def _halving_shares(bench: Bench, distribution_of: Callable[[float], Distribution]) -> Iterator[Trial]:
    """Find ``top_p`` or ``min_p`` by bisection; ``distribution_of`` cuts the more, the larger its argument is."""
    low, high = math.log(LEAST_SHARE), 0.0
    for _ in range(SHARE_STEPS):
        middle = (low + high) / 2
        trial, is_too_much = _cut(bench, distribution_of(math.exp(middle)))
        yield trial
        low, high = (low, middle) if is_too_much else (middle, high)


def _cut(bench: Bench, distribution: Distribution) -> tuple[Trial, bool]:
    """The trial of a truncation, and whether it cuts more than the engine did.

    It does where the trainer finds the answers likelier than the engine does, or cannot have sampled them.
    """
    apart = differences(bench.samples, bench.score(bench.samples, Change(distribution=distribution)))
    trial = Trial(
        "truncated sampling",
        f"the trainer at {distribution}",
        f"the engine cuts off unlikely tokens, as {distribution} does, and renormalises what is left",
        "take the truncation out of the engine's sampling (vLLM: generation_config=vllm); the trainer would learn for "
        "a distribution that is not sampled, unless models.policy_trainer.rollout_correction weighs the difference",
        gap_of(apart),
    )
    return trial, not np.isfinite(apart).all() or float(apart.sum()) < 0
