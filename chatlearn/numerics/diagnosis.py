"""The numerics gate: compare engine and trainer on the same tokens, and find out why they disagree.

Each known cause is tried in turn by computing again with one thing changed; the change after which the gap is gone
names the cause. Causes that leave their mark in the numbers themselves come first, those that need a pass of the
trainer next, and last those that need the engine or a second model.
"""

from __future__ import annotations

from collections.abc import Iterator

from chatlearn.numerics.arithmetic_causes import kernels, number_format, router
from chatlearn.numerics.bench import Bench, Cause
from chatlearn.numerics.gap import pattern
from chatlearn.numerics.sampling_causes import other_temperature, raw_or_temperature, truncated, written_elsewhere
from chatlearn.numerics.token_causes import no_logprobs, other_prompt, shifted
from chatlearn.numerics.verdict import MOST_OF_IT, Trial, Verdict
from chatlearn.numerics.weight_causes import first_weights, sent_again, single_tensors, told_versions

CAUSES: tuple[Cause, ...] = (
    no_logprobs,
    told_versions,
    raw_or_temperature,
    written_elsewhere,
    shifted,
    other_prompt,
    kernels,
    router,
    first_weights,
    truncated,
    other_temperature,
    number_format,
    sent_again,
    single_tensors,
)

UNSEEN_ROUTES = (
    "whether both send tokens to the same experts was not looked at, because the engine did not tell where it sent "
    "them; set models.policy_trainer.router_replay=compare to have it looked at"
)


def diagnose(bench: Bench) -> Verdict:
    """Measure the gap, and explain it where it is above the tolerance."""
    gap, tolerance = bench.gap, bench.facts.tolerance
    if gap.within(tolerance):
        return Verdict(gap, tolerance)
    tried: list[Trial] = []
    for cause in CAUSES:
        found: list[Trial] = []
        for trial in cause(bench):
            tried.append(trial)
            found += [trial] if trial.explains(gap, tolerance) else []
            if found and trial.leaves_nothing(gap):
                break
        if found:
            return Verdict(gap, tolerance, min(found, key=lambda trial: trial.gap.mean), tuple(tried))
    return Verdict(gap, tolerance, _most_telling(gap.mean, tried), tuple(tried), tuple(_remarks(bench)))


def _most_telling(before: float, tried: list[Trial]) -> Trial | None:
    """The trial that left least, if that is little enough to call it the cause of most of the gap."""
    compared = [trial for trial in tried if trial.gap.num_tokens]
    best = min(compared, key=lambda trial: trial.gap.mean, default=None)
    return best if best is not None and best.gap.mean <= MOST_OF_IT * before else None


def _remarks(bench: Bench) -> Iterator[str]:
    yield pattern(bench.samples, bench.apart, bench.facts.tolerance)
    if bench.facts.is_mixture and any(sample.routed_experts is None for sample in bench.samples):
        yield UNSEEN_ROUTES
