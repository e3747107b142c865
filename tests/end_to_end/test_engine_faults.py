"""Engines and graders may die, hang or break at any moment: the run finishes, and every prompt counts exactly once."""

from __future__ import annotations

import random
from pathlib import Path

from runs import Launcher, finish, metrics
from sabotage import Deed, harm, miscounted

NUM_PROMPTS, NUM_COMPLETIONS = 32, 8
QUIET = (
    f"runtime_args.sample_per_episode={NUM_PROMPTS * NUM_COMPLETIONS}",
    f"runtime_args.train_global_batch_size={NUM_PROMPTS * NUM_COMPLETIONS}",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
    "runtime_args.save_episode_interval=0",
)
# The simple engine starts in half the time of vLLM, and what is tested here lies around the engine.
SIMPLE = ("runtime_args.rollout_backend=transformers", "models.policy.num_gpu=2", "runtime_args.engine_timeout_s=8")
NINE: tuple[Deed, ...] = ("kill an engine", "kill a grader", "stop an engine") * 3


def test_engines_and_graders_that_die_or_hang_are_replaced(launcher: Launcher, tmp_path: Path) -> None:
    num_episodes, chance = 14, random.Random(4)
    run = launcher.start(tmp_path, *QUIET, *SIMPLE, f"runtime_args.num_episode={num_episodes}")
    harms = [harm(tmp_path, run, deed, chance) for deed in NINE]
    ended = finish(run)
    assert ended.returncode == 0, (harms, ended.stderr)
    assert miscounted(tmp_path, num_episodes, NUM_PROMPTS, NUM_COMPLETIONS) == []
    last = metrics(tmp_path)[num_episodes]
    assert last["rollout/replaced_engines"] >= 6
    assert last["rule_reward/replaced_graders"] >= 3
    assert "it has not answered for 8 s; another one is started" in ended.stderr
    assert max(numbers["numerics/rollout_logprob_diff_mean"] for numbers in metrics(tmp_path).values()) < 1e-5
