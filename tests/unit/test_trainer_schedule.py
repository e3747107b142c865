"""The learning rate as a function of the step's number."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.trainer.schedule import CONSTANT, Schedule, learning_rate

LR = 3e-4
DECAYS = ("linear", "cosine")
ROUNDING = 1e-12 * LR  # of a handful of operations in float64


@st.composite
def schedules(draw: st.DrawFn, kinds: tuple[str, ...] = ("constant", *DECAYS)) -> Schedule:
    total = draw(st.integers(1, 300))
    return Schedule(
        kind=draw(st.sampled_from(kinds)),
        warmup_iterations=draw(st.integers(0, total)),
        min_lr=LR * draw(st.floats(0, 1)),
        total_iterations=total,
    )


def rates(schedule: Schedule) -> list[float]:
    """Of all steps of the run and some after it."""
    return [learning_rate(LR, schedule, iteration) for iteration in range(1, schedule.total_iterations + 20)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schedules())
def test_rates_stay_between_nothing_and_lr(schedule: Schedule) -> None:
    found = rates(schedule)
    assert max(found) <= LR + ROUNDING
    assert found[0] > 0, "the first step moves"
    after_warmup = found[max(schedule.warmup_iterations, 1) - 1 :]
    assert min(after_warmup) >= (LR if schedule.kind == "constant" else schedule.min_lr)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schedules())
def test_a_warmup_rises_in_equal_steps_to_lr(schedule: Schedule) -> None:
    peak = max(schedule.warmup_iterations, 1)
    found = rates(schedule)
    assert found[peak - 1] == LR
    rises = [after - before for before, after in zip([0.0, *found], found[:peak], strict=False)]
    assert rises == pytest.approx([LR / peak] * peak)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schedules(DECAYS))
def test_a_decay_never_rises_and_ends_at_min_lr_with_the_run(schedule: Schedule) -> None:
    peak = max(schedule.warmup_iterations, 1)
    after_warmup = rates(schedule)[peak - 1 :]
    assert all(after <= before + ROUNDING for before, after in pairwise(after_warmup))
    if schedule.total_iterations > peak:
        assert learning_rate(LR, schedule, schedule.total_iterations) == schedule.min_lr
        assert after_warmup[-1] == schedule.min_lr, "a longer run stays there"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schedules(DECAYS))
def test_a_decay_has_no_leap(schedule: Schedule) -> None:
    """Not at the end of the warm-up either: one step falls by no more than the steepest part of the curve."""
    peak = max(schedule.warmup_iterations, 1)
    after_warmup = rates(schedule)[peak - 1 :]
    steepest = {"linear": 1.0, "cosine": 1.5708}[schedule.kind]
    bound = steepest * (LR - schedule.min_lr) / max(schedule.total_iterations - peak, 1) + ROUNDING
    assert all(before - after <= bound for before, after in pairwise(after_warmup))


def test_a_decay_is_halfway_down_in_the_middle() -> None:
    for kind in DECAYS:
        assert learning_rate(1.0, Schedule(kind, 1, 0.2, 11), 6) == pytest.approx(0.6)
    quarters = [learning_rate(1.0, Schedule("cosine", 1, 0.0, 5), iteration) for iteration in (2, 4)]
    assert quarters == pytest.approx([(2 + 2**0.5) / 4, (2 - 2**0.5) / 4])


def test_the_default_is_the_rate_that_was_asked_for() -> None:
    assert {learning_rate(LR, CONSTANT, iteration) for iteration in (1, 2, 10**6)} == {LR}
    assert learning_rate(0.0, CONSTANT, 1) == 0.0


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(AssertionError, match="count from 1"):
        learning_rate(LR, CONSTANT, 0)
    with pytest.raises(AssertionError, match="no step is left"):
        Schedule("linear", 11, 0.0, 10)
    with pytest.raises(AssertionError, match="above where it starts"):
        learning_rate(LR, replace(CONSTANT, kind="cosine", min_lr=2 * LR, total_iterations=10), 2)
