"""Grading in processes: order, deadlines, deaths, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from chatlearn.errors import ConfigError, RunError
from chatlearn.records import Completion, Prompt, Rollout
from chatlearn.reward.grade import REWARDS, Grader, require_rewards

PLUGIN = '''
PLAIN = 3
import os, signal, time
from pathlib import Path
import numpy as np
from chatlearn.records import Score
from chatlearn.reward.grade import from_compute_score

def by_order(prompt, completion):
    """The text says what happens."""
    match completion.text.split():
        case ["number", number]: return float(number)
        case ["parts"]: return Score(1.0, {"format": np.float32(0.5)})
        case ["numpy"]: return np.float32(0.25)
        case ["nothing"]: return None
        case ["raise"]: raise KeyError("oops")
        case ["exit"]: raise SystemExit(3)
        case ["sleep"]: time.sleep(600)
        case ["stuck"]: return 7 ** (7 ** 12)
        case ["print"]: print("noise"); return 1
        case ["die"]: os.kill(os.getpid(), signal.SIGKILL)
        case ["die-once", mark]:
            if Path(mark).exists(): return 1
            Path(mark).touch(); os.kill(os.getpid(), signal.SIGKILL)

def compute_score(solution_str, ground_truth):
    return float(solution_str.endswith(ground_truth))

upstream = from_compute_score(compute_score)
'''


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))


@contextlib.contextmanager
def grader(deadline_s: float = 60.0, num_processes: int = 1, function: str = "by_order") -> Iterator[Grader]:
    with contextlib.closing(Grader(f"reward_plugin:{function}", deadline_s, num_processes)) as grader:
        yield grader


def make_rollout(*texts: str, source: str = "mine", answer: str = "5") -> Rollout:
    nothing = np.zeros(0)
    prompt = Prompt("0_0", nothing.astype(np.int32), "", source, answer)
    return Rollout(
        prompt,
        tuple(Completion(nothing.astype(np.int32), nothing.astype(np.float32), text, "stop", ()) for text in texts),
    )


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def soon(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_scores_stand_in_the_order_of_the_completions() -> None:
    with grader(num_processes=2) as judge:
        rollouts = [make_rollout(*(f"number {10 * group + place}" for place in range(5))) for group in range(8)]
        graded = judge.grade(rollouts)
        assert [entry.rollout for entry in graded] == rollouts
        values = [[score.value for score in entry.scores] for entry in graded]
        assert values == [[10 * group + place for place in range(5)] for group in range(8)]
        assert judge.grade([]) == []


def test_what_a_function_returns_or_raises(capfd: pytest.CaptureFixture[str]) -> None:
    with grader() as judge:
        texts = ["parts", "numpy", "nothing", "number nan", "number inf", "raise", "print"]
        (graded,) = judge.grade([make_rollout(*texts)])
    scores = dict(zip(texts, graded.scores, strict=True))
    assert (scores["parts"].value, scores["parts"].parts) == (1.0, {"format": 0.5})
    assert scores["numpy"].value == 0.25
    assert [score.value for score in graded.scores[2:6]] == [0.0] * 4
    assert "must return a number or a Score, not NoneType" in (scores["nothing"].error or "")
    assert "must be finite" in (scores["number nan"].error or "")
    assert "must be finite" in (scores["number inf"].error or "")
    assert scores["raise"].error == "KeyError: 'oops'"
    assert scores["print"].error is None
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("trouble", ["sleep", "stuck"])
def test_a_stuck_answer_costs_its_deadline_and_no_other_answer(trouble: str) -> None:
    with grader(deadline_s=1.0) as judge:
        (graded,) = judge.grade([make_rollout("number 1", trouble, "number 2")])
        assert [score.value for score in graded.scores] == [1.0, 0.0, 2.0]
        assert [score.error for score in graded.scores] == [None, "no verdict within 1 s", None]


def test_a_process_that_dies_over_an_answer_is_replaced() -> None:
    with grader() as judge:
        (graded,) = judge.grade([make_rollout("number 1", "die", "number 2", "exit", "number 3")])
        assert [score.value for score in graded.scores] == [1.0, 0.0, 2.0, 0.0, 3.0]
        errors = [score.error for score in graded.scores]
        assert errors[1] == "the grader process was killed by signal 9, 2 times"
        assert errors[3] == "the grader process ended with status 3, 2 times"
        assert errors[0] is errors[2] is errors[4] is None


def test_an_answer_gets_a_second_chance_after_a_death(tmp_path: Path) -> None:
    with grader() as judge:
        (graded,) = judge.grade([make_rollout(f"die-once {tmp_path / 'mark'}")])
        assert (graded.scores[0].value, graded.scores[0].error) == (1.0, None)


def test_killing_idle_processes_loses_nothing() -> None:
    with grader(num_processes=2) as judge:
        for _ in range(2):
            (graded,) = judge.grade([make_rollout(*(f"number {place}" for place in range(20)))])
            assert [score.value for score in graded.scores] == list(range(20))
            assert not any(score.error for score in graded.scores)
            for pid in judge.pids:
                os.kill(pid, signal.SIGKILL)


def test_an_interrupted_call_does_not_speak_into_the_next() -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with grader() as judge:
            judge.grade([make_rollout("number 1")])
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt):
                judge.grade([make_rollout("sleep")])
            (graded,) = judge.grade([make_rollout("number 2")])
            assert graded.scores[0].value == 2.0
    finally:
        signal.signal(signal.SIGALRM, before)


def test_close_is_quick_and_leaves_no_process() -> None:
    with grader(num_processes=2) as judge:
        judge.grade([make_rollout("number 1")])
        pids = judge.pids
        begin = time.monotonic()
    assert time.monotonic() - begin < 3.0
    assert not any(is_alive(pid) for pid in pids)


PARENT = """
import sys
from test_reward_grader import make_rollout
from chatlearn.reward.grade import Grader
judge = Grader("reward_plugin:by_order", 600, 2)
judge.grade([make_rollout("number 1", "number 2", "number 3")])
print(*judge.pids, flush=True)
judge.grade([make_rollout("stuck", "sleep")])
"""


def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    path = f"{Path(__file__).parent}:{tmp_path}"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(is_alive(pid) for pid in pids)
    time.sleep(0.5)  # let them sink into their answers
    parent.kill()
    parent.wait()
    assert soon(lambda: not any(is_alive(pid) for pid in pids))


def test_functions_that_take_texts_are_adapted() -> None:
    with grader(function="upstream") as judge:
        (graded,) = judge.grade([make_rollout("it is 5", "it is 6")])
        assert [score.value for score in graded.scores] == [1.0, 0.0]


def test_mathematics_by_data_source() -> None:
    with contextlib.closing(Grader(deadline_s=1.0)) as judge:
        tower = r"\boxed{9^{9^{9^9}}}"
        graded = judge.grade(
            [
                make_rollout(r"\boxed{1+x}", "1+x", tower, source="aime25", answer="x+1"),
                make_rollout(tower, r"\boxed{5}", source="openai/gsm8k"),
            ]
        )
        assert [[score.value for score in entry.scores] for entry in graded] == [[1.0, 0.0, 0.0], [0.0, 1.0]]
        errors = [[score.error for score in entry.scores] for entry in graded]
        assert errors == [[None, None, "no verdict within 1 s"], [None, None]]


def test_unknown_sources_and_functions_are_named_before_anything_starts() -> None:
    require_rewards(REWARDS, None)
    require_rewards(["mine"], "reward_plugin:by_order")
    require_rewards(["mine"], "boxed_math")
    with pytest.raises(ConfigError, match=r"'mine'.*\n.*'yours'") as caught:
        require_rewards(["yours", "mine", "aime24", "mine"], None)
    assert all("models.reward.function" in problem for problem in caught.value.problems)
    with pytest.raises(ConfigError, match=r"models\.reward\.function=boxed_maths is unknown; did you mean boxed_math"):
        require_rewards(["mine"], "boxed_maths")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent_module:f", "cannot import absent_module"),
        ("reward_plugin:PLAIN", "is int, not a function"),
        ("reward_plugin:absent", "reward_plugin has no absent"),
    ],
)
def test_a_function_that_cannot_be_imported_is_a_mistake_of_the_configuration(function: str, message: str) -> None:
    with contextlib.closing(Grader(function)) as judge, pytest.raises(ConfigError, match=message):
        judge.grade([make_rollout("number 1")])


def test_processes_that_never_start_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "reward_plugin.py").write_text("raise SystemExit(7)")
    with grader() as judge, pytest.raises(RunError, match="ended with status 7 before it was ready, 3 times"):
        judge.grade([make_rollout("number 1")])
