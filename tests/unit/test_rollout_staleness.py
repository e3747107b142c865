"""Answers are never older than the bound says, whatever the engines do, and the run never stands still."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.rollout.staleness import StalenessBound

laws = settings(max_examples=150, deadline=None, derandomize=True)


@laws
@given(
    bound=st.integers(0, 4),
    batch=st.integers(1, 6),
    first=st.integers(0, 5),
    episodes=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_no_group_is_older_than_the_bound_when_it_is_learned_from(
    bound: int, batch: int, first: int, episodes: int, seed: int
) -> None:
    """Engines as unfair as can be: each wait, any of the groups in flight may be the next to finish."""
    chance, last = random.Random(seed), first + episodes
    books = StalenessBound(bound, batch, first, last)
    begun_with: dict[int, int] = {}
    in_flight: list[int] = []
    ready: list[int] = []
    for version in range(first, last):
        for _ in range(books.num_allowed(version)):
            number = len(begun_with)
            books.begin(number, version)
            begun_with[number] = version
            in_flight.append(number)
        # Some finish early, so that fresh groups compete with old ones.
        chance.shuffle(in_flight)
        num_early = chance.randint(0, len(in_flight))
        ready, in_flight = [*ready, *in_flight[:num_early]], in_flight[num_early:]
        while (chosen := books.choose(version, ready)) is None:
            assert in_flight, "nothing is in flight, and the batch is not complete: the run would stand still"
            ready.append(in_flight.pop(chance.randrange(len(in_flight))))
        books.learn(chosen)
        ready = [number for number in ready if number not in chosen]
        assert len(set(chosen)) == batch
        assert all(version - begun_with[number] <= bound for number in chosen)
    assert in_flight == ready == [], "everything that was begun was learned from"
    assert len(begun_with) == batch * episodes


@laws
@given(
    bound=st.integers(0, 4),
    batch=st.integers(1, 6),
    cut=st.integers(0, 8),
    episodes=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_a_resumed_run_takes_up_all_that_was_open_and_keeps_the_bound(
    bound: int, batch: int, cut: int, episodes: int, seed: int
) -> None:
    """After ``cut`` batches the books are closed and opened anew with what was not learned from."""
    chance, first = random.Random(seed), 3
    last, cut = first + episodes, min(cut, episodes - 1)
    books = StalenessBound(bound, batch, first, last)
    born: dict[int, int] = {}
    open_numbers: list[int] = []
    learned = 0
    for version in range(first, last):
        if version == first + cut:
            left = [(number, books.born(number)) for number in open_numbers]
            books = StalenessBound(bound, batch, version, last)
            for number, age in left:
                assert age == born[number]
                assert books.admits(age, version)
                books.begin(number, age)
        for _ in range(books.num_allowed(version)):
            number = len(born)
            books.begin(number, version)
            born[number] = version
            open_numbers.append(number)
        ready = chance.sample(open_numbers, min(batch, len(open_numbers)))
        while (chosen := books.choose(version, ready)) is None:
            ready.append(chance.choice([number for number in open_numbers if number not in ready]))
        books.learn(chosen)
        learned += len(chosen)
        open_numbers = [number for number in open_numbers if number not in chosen]
        assert all(version - born[number] <= bound for number in chosen)
    assert (learned, len(born), open_numbers) == (batch * episodes, batch * episodes, [])


def test_what_todays_bound_does_not_allow_is_not_taken_up() -> None:
    books = StalenessBound(1, 2, first_version=5, last_version=9)
    assert not books.admits(3, 5), "its last chance has passed"
    assert not books.admits(6, 5), "it is of a version that is not there yet"
    for number in range(2):
        assert books.admits(4, 5)
        books.begin(number, 4)
    assert not books.admits(4, 5), "more old ones than the next batch can hold"
    assert books.admits(5, 5)


def test_a_bound_of_zero_is_the_synchronous_schedule() -> None:
    books = StalenessBound(0, 2, first_version=0, last_version=3)
    assert books.num_allowed(0) == 2
    books.begin(0, 0)
    books.begin(1, 0)
    assert books.num_allowed(0) == 0
    assert books.choose(0, [1]) is None
    assert books.choose(0, [1, 0]) == [0, 1]
    assert books.num_allowed(1) == 2


def test_what_would_become_too_old_is_waited_for_and_goes_first() -> None:
    books = StalenessBound(1, 1, first_version=0, last_version=9)
    books.begin(0, 0)
    books.begin(1, 0)
    assert books.choose(0, [1]) == [1], "the first batch may leave the long answer"
    books.learn([1])
    books.begin(2, 1)
    assert books.choose(1, [2]) is None, "after the second it would be two versions old"
    assert books.choose(1, [2, 0]) == [0]


def test_a_batch_of_new_groups_does_not_leave_more_old_ones_than_the_next_batches_can_hold() -> None:
    """Both old groups have their last chance with version 2, and only one batch is left for them after this one."""
    books = StalenessBound(2, 1, first_version=0, last_version=9)
    for number in range(3):
        books.begin(number, 0)
    books.learn([2])
    books.begin(3, 1)
    assert books.choose(1, [3]) is None
    assert books.choose(1, [3, 1]) == [1]


def test_more_than_is_allowed_is_never_begun() -> None:
    books = StalenessBound(0, 1, first_version=0, last_version=9)
    books.begin(0, 0)
    with pytest.raises(AssertionError, match="more groups"):
        books.begin(1, 0)


def test_groups_of_others_are_not_counted() -> None:
    """Evaluation's groups are ready too, and are nobody's batch."""
    books = StalenessBound(0, 1, first_version=0, last_version=9)
    books.begin(7, 0)
    assert books.choose(0, [3, 5]) is None
    assert books.choose(0, [3, 5, 7]) == [7]
