"""Answers in parts are one answer; what cannot be an answer is recognised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from chatlearn.records import Completion, IntStream, VersionRun
from chatlearn.rollout.continuation import continued, merged
from chatlearn.rollout.engine import Finished, Request
from chatlearn.rollout.soundness import fault_of

GOOD = Completion(np.array([3, 4], np.int32), np.array([-1, -2], np.float32), "34", "stop", (VersionRun(5, 2),))


def spelt(token_ids: IntStream) -> str:
    return "".join(map(str, token_ids.tolist()))


def test_an_answer_goes_on_with_everything_its_tokens_were_born_with() -> None:
    begun = replace(GOOD, finish_reason="length")
    more = Completion(np.array([7], np.int32), np.array([-3], np.float32), "7", "stop", (VersionRun(6, 1),))
    whole = continued(begun, more, spelt)
    assert whole.token_ids.tolist() == [3, 4, 7]
    assert whole.logprobs.tolist() == [-1, -2, -3]
    assert (whole.text, whole.finish_reason) == ("347", "stop")
    assert whole.versions == (VersionRun(5, 2), VersionRun(6, 1))
    assert continued(None, more, spelt) is more
    request = Request("0.0", np.array([1, 2], np.int32), begun)
    assert request.known_token_ids().tolist() == [1, 2, 3, 4]


def test_runs_of_one_version_become_one() -> None:
    assert merged((VersionRun(1, 2),), (VersionRun(1, 3), VersionRun(2, 1))) == (VersionRun(1, 5), VersionRun(2, 1))
    assert merged((), (VersionRun(1, 3),)) == (VersionRun(1, 3),)


def test_a_token_keeps_the_experts_that_it_met_first() -> None:
    first, again = (np.full((length, 1, 1), value, np.uint8) for length, value in ((3, 1), (5, 2)))
    whole = continued(replace(GOOD, routed_experts=first), replace(GOOD, routed_experts=again), spelt)
    assert whole.routed_experts is not None
    assert whole.routed_experts.ravel().tolist() == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": np.array([3, 10], np.int32)}, "outside the vocabulary of 10"),
        ({"token_ids": np.array([-1, 4], np.int32)}, "outside the vocabulary of 10"),
        ({"logprobs": np.array([-1], np.float32)}, "1 log-probabilities for 2 tokens"),
        ({"logprobs": np.array([-1, np.nan], np.float32)}, "not finite"),
        ({"logprobs": np.array([-np.inf, -1], np.float32)}, "not finite"),
        ({"versions": (VersionRun(5, 1),)}, "do not add up to its 2 tokens"),
        (
            {"token_ids": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "versions": ()},
            "no token at all",
        ),
    ],
)
def test_what_cannot_be_an_answer_is_named(change: dict[str, object], words: str) -> None:
    assert fault_of(Finished("0.0", GOOD), vocabulary=10) is None
    fault = fault_of(Finished("0.0", replace(GOOD, **change)), vocabulary=10)
    assert fault is not None
    assert words in fault


def test_an_aborted_answer_may_be_empty() -> None:
    empty = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), "", "abort", ())
    assert fault_of(Finished("0.0", empty), vocabulary=10) is None
