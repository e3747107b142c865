"""Engines and graders may die, hang or break at any moment: the run finishes, and every prompt counts exactly once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from runs import Launcher, finish, metrics
from sabotage import Deed, harm, miscounted

NUM_PROMPTS, NUM_COMPLETIONS = 32, 8
LONGEST_TEST_S = 900  # Engines start again and again, which on a busy machine takes its time.
QUIET = (
    f"runtime_args.sample_per_episode={NUM_PROMPTS * NUM_COMPLETIONS}",
    f"runtime_args.train_global_batch_size={NUM_PROMPTS * NUM_COMPLETIONS}",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
    "runtime_args.save_episode_interval=0",
    "models.policy_trainer.num_gpu=1",
)
# The simple engine starts in half the time of vLLM, and what is tested here lies around the engine.
SIMPLE = ("runtime_args.rollout_backend=mad:MadEngine", "models.policy.num_gpu=2", "runtime_args.engine_timeout_s=8")
NINE: tuple[Deed, ...] = ("kill an engine", "kill a grader", "stop an engine") * 3


# An engine that goes mad once, when there is a file that says so.
MAD_ENGINE = """
import math
import os
from dataclasses import replace
from pathlib import Path

from chatlearn.rollout.tiny_engine import TransformersEngine


class MadEngine(TransformersEngine):
    def completions(self, patience_s=math.inf):
        for item in super().completions(patience_s):
            if Path(os.environ["MADNESS"]).exists():
                Path(os.environ["MADNESS"]).unlink()
                item = replace(item, completion=replace(item.completion, logprobs=item.completion.logprobs * math.nan))
            yield item
"""
TENSOR_PARALLEL = (
    "models.policy.num_gpu=2",
    "models.policy.tensor_model_parallel_size=2",
    "models.policy.enforce_eager=True",  # Else every engine that is started anew compiles anew.
)


@pytest.mark.timeout(LONGEST_TEST_S)
def test_engines_and_graders_that_die_or_hang_are_replaced(launcher: Launcher, tmp_path: Path) -> None:
    num_episodes, chance = 14, random.Random(4)
    (tmp_path / "mad.py").write_text(MAD_ENGINE)
    output, madness = tmp_path / "run", tmp_path / "madness"
    overrides = (*QUIET, *SIMPLE, f"runtime_args.num_episode={num_episodes}")
    run = launcher.start(output, *overrides, PYTHONPATH=str(tmp_path), MADNESS=str(madness))
    harms = [harm(output, run, deed, chance) for deed in NINE]
    madness.touch()
    ended = finish(run)
    assert ended.returncode == 0, (harms, ended.stderr)
    assert miscounted(output, num_episodes, NUM_PROMPTS, NUM_COMPLETIONS) == []
    last = metrics(output)[num_episodes]
    assert last["rollout/replaced_engines"] == 7
    assert "with a log-probability that is not finite" in ended.stderr
    assert last["rule_reward/replaced_graders"] == 3
    assert "it has not answered for 8 s; another one is started" in ended.stderr
    assert max(numbers["numerics/rollout_logprob_diff_mean"] for numbers in metrics(output).values()) < 1e-5


@pytest.mark.timeout(LONGEST_TEST_S)
def test_an_engine_that_loses_one_of_its_processes_is_replaced_whole(launcher: Launcher, tmp_path: Path) -> None:
    """A single engine, and vLLM itself: what it had not answered waits for its successor."""
    num_episodes, chance = 7, random.Random(5)
    run = launcher.start(tmp_path, *QUIET, *TENSOR_PARALLEL, f"runtime_args.num_episode={num_episodes}")
    harms = [harm(tmp_path, run, "kill a tensor-parallel worker", chance) for _ in range(3)]
    ended = finish(run)
    assert ended.returncode == 0, (harms, ended.stderr)
    assert miscounted(tmp_path, num_episodes, NUM_PROMPTS, NUM_COMPLETIONS) == []
    assert metrics(tmp_path)[num_episodes]["rollout/replaced_engines"] == 3
    assert max(numbers["numerics/rollout_logprob_diff_mean"] for numbers in metrics(tmp_path).values()) < 1e-5
