"""Laws of the prompt stream: every prompt once an epoch, none twice in a take, and exact continuation."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.data.stream import PromptStream, StreamPosition
from chatlearn.errors import DataError
from chatlearn.records import Prompt

laws = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.integers(1, 23)
seeds = st.integers(0, 2**32)
counts = st.lists(st.integers(1, 23), min_size=1, max_size=30)


def make_prompts(number: int) -> list[Prompt]:
    return [Prompt(f"0_{index}", np.array([index], np.int32), "", "test", "") for index in range(number)]


def uids(prompts: list[Prompt]) -> list[str]:
    return [prompt.uid for prompt in prompts]


@laws
@given(size=sizes, seed=seeds, shuffle=st.booleans(), counts=counts)
def test_no_prompt_is_ever_a_round_ahead_of_another(size: int, seed: int, shuffle: bool, counts: list[int]) -> None:
    prompts = make_prompts(size)
    stream = PromptStream(prompts, seed, shuffle)
    times = Counter({prompt.uid: 0 for prompt in prompts})
    for count in counts:
        taken = uids(stream.take(min(count, size)))
        assert len(set(taken)) == len(taken) == min(count, size)
        times.update(taken)
        assert max(times.values()) - min(times.values()) <= 1


@laws
@given(size=sizes, seed=seeds, counts=counts, cut=st.integers(0, 30))
def test_a_restored_stream_goes_on_as_the_old_one(size: int, seed: int, counts: list[int], cut: int) -> None:
    prompts = make_prompts(size)
    stream = PromptStream(prompts, seed, shuffle=True)
    for count in counts[:cut]:
        stream.take(count)
    saved = json.loads(json.dumps(asdict(stream.position)))
    position = StreamPosition(saved["epoch"], saved["offset"], tuple(saved["deferred"]))
    restored = PromptStream(prompts, seed, shuffle=True, position=position)
    for count in counts:
        assert uids(restored.take(count)) == uids(stream.take(count))
    assert restored.position == stream.position


@laws
@given(size=sizes, epochs=st.integers(1, 4), extra=st.integers(0, 22))
def test_more_than_there_are_come_in_whole_rounds(size: int, epochs: int, extra: int) -> None:
    stream = PromptStream(make_prompts(size), seed=1, shuffle=True)
    times = Counter(uids(stream.take(size * epochs + extra % size)))
    assert set(times.values()) <= {epochs, epochs + 1}
    assert len(times) == size


def test_without_shuffling_the_order_is_the_files() -> None:
    prompts = make_prompts(7)
    stream = PromptStream(prompts, seed=1, shuffle=False)
    assert uids(stream.take(7)) == uids(prompts)
    assert uids(stream.take(5)) == uids(prompts[:5])
    # 5 and 6 end the epoch; then 0, 1, 2 begin the next one.
    assert uids(stream.take(5)) == [f"0_{index}" for index in (5, 6, 0, 1, 2)]


def test_a_repeat_within_a_take_waits_for_the_next() -> None:
    prompts = make_prompts(5)
    position = StreamPosition(epoch=0, offset=3)
    stream = PromptStream(prompts, seed=3, shuffle=True, position=position)
    first, second = stream.take(4), stream.take(4)
    tail = uids(first)[:2]
    assert len(set(uids(first))) == 4
    assert stream.position.epoch == 2
    # The second epoch: two prompts of it are in the first take, the other three come next, deferred ones in front.
    assert set(uids(first)[2:]) | set(uids(second)[:3]) == set(uids(prompts))
    assert set(tail) <= set(uids(second)[:3])


@laws
@given(size=sizes, taken=st.integers(1, 30), returned=st.integers(0, 30), seed=st.integers(0, 9))
def test_prompts_that_are_given_back_come_first_and_nothing_else_changes(
    size: int, taken: int, returned: int, seed: int
) -> None:
    """Whether they are given back in this process, or were unfinished when it ended and another one goes on."""
    prompts = make_prompts(size)
    stream, plain = PromptStream(prompts, seed, shuffle=True), PromptStream(prompts, seed, shuffle=True)
    taken = min(taken, size)
    unfinished = stream.take(taken)[taken - min(returned, taken) :]
    plain.take(taken)
    stream.give_back(unfinished)
    resumed = PromptStream(prompts, seed, shuffle=True, position=stream.position)
    assert uids(resumed.take(len(unfinished))) == uids(stream.take(len(unfinished))) == uids(unfinished)
    assert resumed.position == stream.position == plain.position


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    prompts = make_prompts(50)
    stream = PromptStream(prompts, seed=1, shuffle=True)
    first, second = uids(stream.take(50)), uids(stream.take(50))
    other = uids(PromptStream(prompts, seed=2, shuffle=True).take(50))
    assert first != second != other != first
    # A promise to every saved position: this order must never change.
    assert first[:6] == [f"0_{index}" for index in (9, 36, 39, 31, 16, 2)]


@pytest.mark.parametrize("position", [StreamPosition(0, 6), StreamPosition(2, 1, (5,))])
def test_a_position_of_other_data_is_refused(position: StreamPosition) -> None:
    with pytest.raises(DataError, match="there are 5 prompts"):
        PromptStream(make_prompts(5), seed=1, shuffle=True, position=position)


def test_a_prompt_of_other_data_cannot_be_given_back() -> None:
    stream = PromptStream(make_prompts(3), seed=1, shuffle=True)
    with pytest.raises(DataError, match=r"the prompt 0_3, .* is not among the 3 prompts; the data, the tokenizer or"):
        stream.give_back(make_prompts(5)[2:])


def test_no_prompts_no_stream() -> None:
    with pytest.raises(DataError, match="no prompts"):
        PromptStream([], seed=1, shuffle=True)
