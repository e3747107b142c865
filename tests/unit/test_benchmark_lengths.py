"""The work that ``benchmarks/rollout.py`` compares whole runs on: answers whose lengths are known beforehand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.episodes import forced
from benchmarks.episodes.forced import LengthBook
from benchmarks.episodes.ours import SCHEDULES, Episode, Run, overrides
from benchmarks.episodes.report import Side, tables
from benchmarks.episodes.transfer import Moved
from benchmarks.episodes.work import (
    ANSWER,
    LENGTHS,
    LONG,
    NUM_ANSWERS,
    NUM_PROMPTS,
    NUM_SAMPLES,
    Lengths,
    write_questions,
)
from chatlearn.config.read import read_config
from chatlearn.records import Completion, VersionRun
from chatlearn.rollout.engine import Request

ROOT = Path(__file__).parents[2]
PROMPT = np.array([5, 6, 7], np.int32)


def completion(num_tokens: int) -> Completion:
    """An answer that was cut off."""
    tokens = np.arange(num_tokens, dtype=np.int32)
    return Completion(tokens, np.zeros(num_tokens, np.float32), "", "length", (VersionRun(1, num_tokens),))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_lengths_have_a_long_tail_and_a_mean_of_a_quarter_of_the_limit(lengths: Lengths) -> None:
    tokens = lengths.tokens()
    assert len(tokens) == NUM_SAMPLES
    assert max(tokens) == lengths.limit
    assert np.mean(tokens) == pytest.approx(lengths.limit / 4, rel=0.05)
    assert np.median(tokens) < lengths.limit / 5


def test_an_answer_gets_the_length_of_its_place_over_and_over() -> None:
    book = LengthBook(LONG.tokens())
    assert book.begin(Request("0.3", PROMPT)) == LONG.tokens()[3]
    assert book.begin(Request("1.0", PROMPT)) == LONG.tokens()[NUM_ANSWERS]
    assert book.begin(Request(f"{NUM_PROMPTS}.3", PROMPT)) == LONG.tokens()[3]
    assert book.begin(Request("probe.3", PROMPT)) is None


def test_an_answer_that_goes_on_gets_a_length_above_what_it_has_from_any_engine() -> None:
    book = LengthBook([100, 30, 50])
    assert [book.begin(Request(name, PROMPT)) for name in ("0.0", "0.1")] == [100, 30]
    cut = book.end("0.0", completion(40))
    assert cut.finish_reason == "length"
    assert book.end("0.1", completion(30)).finish_reason == "stop"
    other = LengthBook([100, 30, 50])
    assert [other.begin(Request(name, PROMPT, begun=cut)) for name in ("1.0", "1.1")] == [100, 50]
    assert other.end("1.1", completion(50)).finish_reason == "stop"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_the_runs_that_are_compared_are_configurations(schedule: str, lengths: Lengths) -> None:
    config = read_config(ROOT / "template" / "quickstart.yaml", overrides(lengths, schedule, num_episodes=3))
    assert config.runtime_args.sample_per_episode == NUM_PROMPTS * NUM_ANSWERS
    module, _, name = config.runtime_args.rollout_backend.partition(":")
    assert module == forced.__name__
    assert vars(forced)[name].__bases__ == (forced.ForcedLengthEngine,)


def test_the_questions_have_the_answer_that_both_sides_reward(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_questions(tmp_path).read_text().splitlines()]
    assert len({row["prompt"][0]["content"] for row in rows}) == NUM_PROMPTS
    for row in rows:
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"][0]["content"])]
        assert sum(numbers) == int(row["reward_model"]["ground_truth"]) == ANSWER


def test_tables_hold_each_ratio_against_its_bound() -> None:
    rounds = [{name: side(speed) for name in LENGTHS} for speed in (1.0, 2.0, 4.0)]
    lines = tables(rounds, Moved(10**9, [0.5, 0.5], [0.25, 0.25]), has_peer=True).splitlines()
    speed = f"{sum(LONG.tokens()) / 2:,.0f}"
    assert f"| {LONG.name} | sync | {speed} | {speed} | 1.00 | 0.95 |" in lines
    assert f"| {LONG.name} | sync, one engine | {speed} | {sum(LONG.tokens()) / 4:,.0f} | 2.00 | 0.95 |" in lines
    assert "| 1000 MB, one engine in the sender's process | 500.0 | 2.00 | 4.00 | 0.500 |" in lines
    assert "| async | 2.00 | 1.00 | 50 % | 75 % |" in lines
    assert f"| {LONG.name} | sync | 2.00 | 8.00 | 4.00 | 1.8 |" in lines
    assert f"| {LONG.name} | 2.00 | 2.00 | 1.00 | 0.67 | 1.15 |" in lines
    assert not any("not measured" in line for line in lines)


def side(speed: float) -> Side:
    """Episodes of 4 s in which answers take 2 s; bare generation takes 2 s or 4 s, bare training 1 s, the peer 8 s."""
    episode = Episode(
        wall_s=4 / speed,
        rollout_s=1.5,
        reward_s=0.5,
        train_s=1 / speed,
        publish_s=0.1,
        engine_busy_s=2 / speed,
        num_tokens=sum(LONG.tokens()),
        transfer_s=0.01,
        transfer_gb_per_s=0.1,
    )
    runs = {schedule: Run(LONG, (episode,) * 3) for schedule in SCHEDULES}
    return Side(runs, {1: [2.0], 2: [4.0]}, [1.0], [8.0])
