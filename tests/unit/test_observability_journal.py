"""The journal: what is written, when, and what an error or a resume leaves of it."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from full_disk import no_file_beyond
from rich.console import Console

from chatlearn.errors import RunError
from chatlearn.observability.journal import Journal, Page
from chatlearn.observability.progress import PLAIN_INTERVAL_S, LineDisplay, open_display
from chatlearn.observability.sinks import SINKS, JournalSpec, metrics_path
from chatlearn.records import Completion, Graded, Prompt, Rollout, Sample, Score, StepStats, VersionRun

STATS = StepStats(
    loss=-0.01,
    pg_loss=-0.01,
    kl_loss=0.0,
    entropy=0.4,
    grad_norm=0.3,
    clip_fraction=0.002,
    lr=2e-4,
    num_tokens=100,
    num_loss_tokens=60,
    rollout_logprob_diff_mean=1e-7,
    rollout_logprob_diff_max=1e-6,
    rollout_kl=1e-9,
)


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def file_console(num_columns: int = 80) -> Console:
    return Console(file=io.StringIO(), width=num_columns, force_terminal=False, highlight=False)


def screen() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=True, highlight=False, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in metrics_path(directory).read_text().splitlines()]


def run_episodes(spec: JournalSpec, first: int, last: int) -> None:
    with Journal.open(spec, file_console()) as journal:
        for episode in range(first, last + 1):
            with journal.page(episode) as page:
                page.add({"rollout/reward_mean": episode / 10})


def page_with(clock: Clock) -> Page:
    return Page("episode 1/2", LineDisplay(file_console(), clock), lambda graded, samples: None, print, clock)


def test_phases_and_idle_time_add_up_to_the_episode() -> None:
    clock = Clock()
    page = page_with(clock)
    for _ in range(2):
        with page.phase("rollout"):
            clock.now += 5
    with page.phase("train"):
        clock.now += 2
        with page.phase("old_logprobs"):
            clock.now += 3
    clock.now += 1
    numbers = page.numbers()
    assert {name: value for name, value in numbers.items() if name.startswith("time/")} == {
        "time/rollout": 10.0,
        "time/train": 2.0,
        "time/old_logprobs": 3.0,
        "time/episode": 16.0,
        "time/idle": 1.0,
    }


def test_a_phase_that_fails_is_over() -> None:
    clock = Clock()
    page = page_with(clock)
    with pytest.raises(ZeroDivisionError), page.phase("rollout"):
        raise ZeroDivisionError
    with page.phase("train"):
        clock.now += 1
    assert page.numbers()["time/train"] == 1.0


def test_every_page_is_one_line_of_numbers(tmp_path: Path) -> None:
    before = time.time()
    with Journal.open(JournalSpec(tmp_path, num_episodes=2), file_console()) as journal:
        journal.write(0, {"eval/s/avg@8": 0.25})
        for episode in (1, 2):
            with journal.page(episode) as page:
                with page.phase("train"):
                    page.add_step(STATS)
                    page.add_step(STATS)
                page.add({"rollout/reward_mean": 0.5})
            assert len(lines_of(tmp_path)) == episode + 1  # on the disk as soon as the page ends
        assert journal.metrics_bytes == metrics_path(tmp_path).stat().st_size
    first, second, third = lines_of(tmp_path)
    assert first == {"step": 0, "time": first["time"], "schema": 1, "eval/s/avg@8": 0.25}
    assert before <= first["time"] <= second["time"] <= third["time"] <= time.time()
    assert (second["step"], third["step"]) == (1, 2)
    assert third["policy_trainer/steps"] == 2
    assert third["policy_trainer/loss"] == STATS.loss
    assert third["time/episode"] >= third["time/train"] >= 0


def test_what_is_known_after_the_page_follows_it_under_both_names(tmp_path: Path) -> None:
    with Journal.open(JournalSpec(tmp_path, num_episodes=1), file_console()) as journal:
        with journal.page(1) as page, page.phase("train"):
            pass
        journal.write(1, {"time/save": 2.5})
    first, second = lines_of(tmp_path)
    assert first["engine/timer_summary/train"] == first["time/train"]
    assert (second["step"], second["time/save"], second["engine/timer_summary/save_checkpoint"]) == (1, 2.5, 2.5)


def test_a_number_that_is_none_stays_readable_json(tmp_path: Path) -> None:
    with Journal.open(JournalSpec(tmp_path, num_episodes=1), file_console()) as journal:
        journal.write(1, {"policy_trainer/loss": math.nan, "policy_trainer/grad_norm": math.inf, "x/y": 1.0})
    (line,) = lines_of(tmp_path)
    assert (line["policy_trainer/loss"], line["policy_trainer/grad_norm"], line["x/y"]) == (None, None, 1.0)


def test_an_episode_that_failed_writes_no_numbers(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        Journal.open(JournalSpec(tmp_path, num_episodes=1), file_console()) as journal,
        journal.page(1) as page,
        page.phase("rollout"),
    ):
        raise ZeroDivisionError
    assert lines_of(tmp_path) == []


def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run_episodes(JournalSpec(tmp_path, num_episodes=6), 0, 5)
    with metrics_path(tmp_path).open("a") as file:
        file.write('{"step": 3, "cut by a cra')
    run_episodes(JournalSpec(tmp_path, num_episodes=6, resume_after=3), 4, 6)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]


def test_beginning_anew_leaves_nothing_of_an_earlier_attempt(tmp_path: Path) -> None:
    run_episodes(JournalSpec(tmp_path, num_episodes=3), 0, 2)
    run_episodes(JournalSpec(tmp_path, num_episodes=3), 0, 1)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1]


def test_an_episode_is_one_line_for_a_person_too(tmp_path: Path) -> None:
    console = file_console()
    with Journal.open(JournalSpec(tmp_path, num_episodes=12), console) as journal:
        with journal.page(3) as page:
            page.add_step(STATS)
            page.add(
                {"rollout/reward_mean": 0.6125, "rollout/response_length_mean": 41.2, "rule_reward/grader_errors": 0.0}
            )
            page.add({"eval/a/b/avg@8": 0.5, "eval/a/b/pass@8": 0.75, "eval/a/b/grader_errors": 0.0})
        journal.write(3, {"time/save": 2.0})  # nothing that a person waits for
    line, evaluation = written(console).splitlines()
    assert line.startswith(
        "episode  3/12  reward 0.613    0.0 s  length   41 tokens  entropy 0.40 nats  grad norm 0.300"
    )
    assert line.endswith("loss -0.0100  clipped  0.2%  engine gap 1e-07 nats")
    assert evaluation == "episode  3/12  evaluation of a/b  avg@8 0.500  pass@8 0.750"


def test_grader_errors_are_shouted(tmp_path: Path) -> None:
    console = file_console()
    with Journal.open(JournalSpec(tmp_path, num_episodes=1), console) as journal:
        journal.write(1, {"rule_reward/grader_errors": 3.0})
    assert written(console) == "episode 1/1  GRADER ERRORS 3\n"


def test_a_terminal_gets_no_line_wider_than_itself(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    with Journal.open(JournalSpec(tmp_path, num_episodes=1), console) as journal, journal.page(1) as page:
        page.add_step(STATS)
        page.add({"rollout/reward_mean": 0.5, "rollout/response_length_mean": 41.2})
    (line,) = written(console).splitlines()
    assert 40 < len(line) <= 60


def test_progress_in_a_file_is_a_line_now_and_then() -> None:
    clock, console = Clock(), file_console()
    with LineDisplay(console, clock).phase("episode 1/2 rollout") as update:
        for done in range(0, 4000, 1000):
            update(done, 4000)
            clock.now += PLAIN_INTERVAL_S / 2
    assert written(console).splitlines() == ["episode 1/2 rollout: 2,000/4,000 after 15 s"]


def test_progress_on_a_screen_is_a_bar_that_vanishes() -> None:
    console = screen()
    display = open_display(console)
    with display.phase("episode 1/2 train") as outer:
        outer(1, 3)
        with display.phase("episode 1/2 old logprobs") as inner:
            inner(32, 1024)
            time.sleep(0.3)  # bars are drawn ten times a second
        console.print("said meanwhile")
    assert "32/1,024" in written(console)
    assert "said meanwhile" in written(console)
    # The last things are to clear the bar's line and to show the cursor again.
    assert written(console).endswith("\x1b[2K\x1b[?25h\r")


def test_progress_outside_a_phase_is_nobodys() -> None:
    page = page_with(Clock())
    before = page.numbers()
    page.progress(1, 2)
    assert page.numbers() == before


def test_words_are_not_markup(tmp_path: Path) -> None:
    console = file_console(num_columns=20)
    with Journal.open(JournalSpec(tmp_path, num_episodes=1), console) as journal:
        journal.say("interrupted [red] at " + "x" * 40)
    assert written(console) == "interrupted [red] at " + "x" * 40 + "\n"


def test_the_curve_shows_all_episodes_also_those_before_a_resume(tmp_path: Path) -> None:
    run_episodes(JournalSpec(tmp_path, num_episodes=9), 1, 5)
    console = file_console()
    with Journal.open(JournalSpec(tmp_path, num_episodes=9, resume_after=5), console) as journal:
        for episode in range(6, 10):
            journal.write(episode, {"rollout/reward_mean": episode / 10})
        before = len(written(console))
        journal.curve()
    drawing = written(console)[before:].splitlines()
    assert drawing[0].strip() == "mean reward"
    assert drawing[-1].strip() == "episode"
    assert drawing[-2].split() == ["1", "3", "5", "7", "9"]
    assert max(map(len, drawing)) <= 80
    # The curve rises: its left end lies in a lower row than its right end.
    rows = [row for row in drawing if "│" in row or "┤" in row]
    dots = [[column for column, sign in enumerate(row) if "⠁" <= sign <= "⣿"] for row in rows]
    leftmost = min((min(columns), row) for row, columns in enumerate(dots) if columns)
    rightmost = max((max(columns), -row) for row, columns in enumerate(dots) if columns)
    assert leftmost[1] > -rightmost[1]


def test_one_episode_makes_no_curve(tmp_path: Path) -> None:
    console = file_console()
    with Journal.open(JournalSpec(tmp_path, num_episodes=1), console) as journal:
        journal.write(1, {"rollout/reward_mean": 1.0})
        before = written(console)
        journal.curve()
    assert written(console) == before


@pytest.fixture
def answered() -> tuple[Graded, list[Sample]]:
    def completion(text: str) -> Completion:
        return Completion(
            token_ids=np.array([5, 6, 7], np.int32),
            logprobs=np.array([-0.1, -1.5, -1e-7], np.float32),
            text=text,
            finish_reason="stop",
            versions=(VersionRun(3, 2), VersionRun(4, 1)),
        )

    def sample(advantage: float, trained: bool) -> Sample:
        mask = np.array([False, False, trained, trained, trained])
        numbers = np.where(mask, advantage, 0).astype(np.float32)
        return Sample("p-1", np.arange(5, dtype=np.int32), mask, np.zeros(5, np.float32), numbers)

    prompt = Prompt("p-1", np.array([1, 2], np.int32), "1+1=", "arithmetic", "2")
    scores = (Score(1.0, {"format": 0.5}), Score(0.0, error="deadline"))
    graded = Graded(Rollout(prompt, (completion("zwei ✓"), completion("?"))), scores)
    return graded, [sample(0.5, True), sample(0.0, False)]


def test_rollouts_have_a_line_per_completion(tmp_path: Path, answered: tuple[Graded, list[Sample]]) -> None:
    graded, samples = answered
    with Journal.open(JournalSpec(tmp_path, num_episodes=1), file_console()) as journal, journal.page(1) as page:
        page.keep([graded], samples)
    first, second = map(json.loads, (tmp_path / "rollouts/episode_000001.jsonl").read_text("utf-8").splitlines())
    assert first == {
        "prompt_uid": "p-1",
        "data_source": "arithmetic",
        "prompt": "1+1=",
        "response": "zwei ✓",
        "ground_truth": "2",
        "token_ids": [5, 6, 7],
        "rollout_logprobs": [-0.1, -1.5, -1e-7],
        "reward": 1.0,
        "reward_parts": {"format": 0.5},
        "grader_error": None,
        "advantage": 0.5,
        "finish_reason": "stop",
        "policy_versions": [{"version": 3, "count": 2}, {"version": 4, "count": 1}],
    }
    assert (second["reward"], second["grader_error"], second["advantage"]) == (None, "deadline", None)


def test_rollouts_can_be_switched_off(tmp_path: Path, answered: tuple[Graded, list[Sample]]) -> None:
    graded, samples = answered
    spec = JournalSpec(tmp_path, num_episodes=1, save_rollouts=False)
    with Journal.open(spec, file_console()) as journal, journal.page(1) as page:
        page.keep([graded], samples)
    assert not (tmp_path / "rollouts").exists()


def test_answers_that_do_not_fit_on_the_disk_are_told_of_once_and_end_nothing(
    tmp_path: Path, answered: tuple[Graded, list[Sample]]
) -> None:
    graded, samples = answered
    console = file_console()
    with Journal.open(JournalSpec(tmp_path, num_episodes=2), console) as journal:
        with journal.page(1) as page, no_file_beyond(0):
            page.keep([graded], samples)
        with journal.page(2) as page:
            page.keep([graded], samples)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["episode_000002.jsonl"]
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    (said,) = [line for line in written(console).splitlines() if "rollouts" in line]
    assert said.startswith("the answers of episode 1 were not written to rollouts/: ")


def test_numbers_that_do_not_fit_end_the_run_in_one_message(tmp_path: Path) -> None:
    spec = JournalSpec(tmp_path, num_episodes=3)
    run_episodes(spec, 1, 2)
    with (
        no_file_beyond(metrics_path(tmp_path).stat().st_size + 9),
        pytest.raises(RunError, match=r"metrics\.jsonl: .*make room there, and the same command"),
    ):
        run_episodes(replace(spec, resume_after=2), 3, 3)
    run_episodes(replace(spec, resume_after=2), 3, 3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


class FailingSink:
    """Stands for a tracker whose disk is full."""

    def __init__(self, spec: JournalSpec, console: Console) -> None:
        self.closed: Callable[[], None] = (spec.directory / "closed").touch

    def write(self, step: int, metrics: object) -> None:
        raise RunError("the metrics sink 'failing' failed: disk full")

    def close(self) -> None:
        self.closed()


def test_every_sink_is_closed_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SINKS, "console", FailingSink)
    with (
        pytest.raises(RunError, match="failing"),
        Journal.open(JournalSpec(tmp_path, num_episodes=1), file_console()) as journal,
    ):
        journal.write(1, {"x/y": 1.0})
    assert (tmp_path / "closed").exists()
