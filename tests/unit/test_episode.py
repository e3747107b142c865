"""The comparison at the heart of the loop: answers against their siblings, and nothing learned from a broken grader."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from chatlearn.algorithm.advantage import ADVANTAGES
from chatlearn.cluster.engine_client import Delivery
from chatlearn.episode import compare, publish, to_sample
from chatlearn.records import Completion, Graded, Prompt, Rollout, Score, VersionRun
from chatlearn.weights.wire import TransferStats

PROMPT = Prompt("0_0", np.array([5, 6, 7], np.int32), "?", "source", "1")
GRPO = ADVANTAGES["grpo"]


def completion(*token_ids: int) -> Completion:
    logprobs = -np.arange(1, len(token_ids) + 1, dtype=np.float32)
    return Completion(np.array(token_ids, np.int32), logprobs, "", "stop", (VersionRun(0, len(token_ids)),))


def graded(*scores: Score) -> Graded:
    completions = tuple(completion(*range(10, 12 + index)) for index in range(len(scores)))
    return Graded(Rollout(PROMPT, completions), scores)


def test_a_sample_is_prompt_and_answer_in_one_stream() -> None:
    sample = to_sample(PROMPT, completion(8, 9), advantage=0.5)
    assert sample.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert sample.loss_mask.tolist() == [False, False, False, True, True]
    assert sample.rollout_logprobs.tolist() == [0, 0, 0, -1, -2]
    assert sample.advantages.tolist() == [0, 0, 0, 0.5, 0.5]
    assert (sample.token_ids.dtype, sample.advantages.dtype) == (np.int32, np.float32)


def test_every_answer_is_compared_with_its_siblings() -> None:
    samples = compare(graded(Score(1.0), Score(0.0)), GRPO)
    assert [sample.advantages[-1] for sample in samples] == pytest.approx([1.0, -1.0], abs=1e-4)


def test_an_answer_the_grader_failed_on_changes_nothing_for_the_others_and_teaches_nothing() -> None:
    with_error = compare(graded(Score(1.0), Score(0.0, error="deadline"), Score(0.0)), GRPO)
    without = compare(graded(Score(1.0), Score(0.0)), GRPO)
    assert not with_error[1].loss_mask.any()
    assert [with_error[0].advantages[-1], with_error[2].advantages[-1]] == [
        without[0].advantages[-1],
        without[1].advantages[-1],
    ]


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_group_that_could_not_be_graded_at_all_is_left_out(name: str) -> None:
    samples = compare(graded(Score(0.0, error="deadline"), Score(0.0, error="deadline")), ADVANTAGES[name])
    assert len(samples) == 2
    assert not any(sample.loss_mask.any() for sample in samples)


class Diary:
    """Stands for engines and trainer, and writes down in which order they are asked."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.current_version: int | None = None

    def wake(self, part: str) -> None:
        self.entries.append(f"wake {part}")

    @contextmanager
    def weights_resident(self) -> Generator[None]:
        self.entries.append("bring")
        yield
        self.entries.append("send home")

    def send_weights(self, version: int) -> Delivery:
        self.entries.append(f"send {version}")
        return Delivery(TransferStats(version, 1, 4, 0.1), lost=((1, 77),))

    @contextmanager
    def held(self) -> Generator[None]:
        self.entries.append("hold")
        yield
        self.entries.append("let go")

    def lose(self, lost: Sequence[tuple[int, int]]) -> None:
        self.entries.append(f"lose {list(lost)}, weights at hand: {self.current_version}")


def test_engines_take_the_memory_of_their_cache_only_when_the_trainer_has_left() -> None:
    """Weights travel while both are there; cache and trainer together would not fit where the two share a GPU."""
    diary = Diary()
    publish(cast("Any", SimpleNamespace(policy=diary, trainer=diary)), version=3)
    assert diary.entries == [
        "hold", "wake weights", "bring", "send 3", "send home", "lose [(1, 77)], weights at hand: 3", "wake kv_cache",
        "let go",
    ]  # fmt: skip
