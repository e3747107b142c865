"""Whole runs of the real command on the work of the comparison, and what their metrics say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.episodes.work import (
    LEARNING_RATE,
    MAX_PROMPT_TOKENS,
    MODEL,
    NUM_ANSWERS,
    NUM_SAMPLES,
    ROOT,
    TEMPERATURE,
    Lengths,
)

ENGINES: Final = {"long-tailed": "LongTailedEngine", "short": "ShortEngine"}

# The first episodes compile, compare numerics and fill the pipeline; in the last ones nothing more is asked for.
NUM_FIRST = 2
NUM_LAST = 1

# Two engines with a core each are faster than one with both: what a token costs of so small a model is mostly waiting.
TWO_ENGINES = "models.policy.num_gpu=2"
ONE_ENGINE = "sync, one engine"

SCHEDULES: Final[Mapping[str, tuple[str, ...]]] = {
    "sync": (TWO_ENGINES,),
    ONE_ENGINE: (),
    # Where engines and trainer work side by side each has one of the two cores.
    "one_step_off": ("runtime_args.schedule=one_step_off", "models.policy_trainer.num_gpu=1"),
    "async": ("runtime_args.schedule=async", "models.policy_trainer.num_gpu=1"),
    "partial rollout": (
        TWO_ENGINES,
        "runtime_args.use_partial_rollout=True",
        "models.partial_rollout_manager.mini_response_per_prompt=3",
    ),
}


@dataclass(frozen=True)
class Episode:
    """The numbers of one episode: seconds, and tokens of the answers that were learned from."""

    wall_s: float
    rollout_s: float
    reward_s: float
    train_s: float
    publish_s: float
    engine_busy_s: float
    num_tokens: float
    transfer_s: float
    transfer_gb_per_s: float


@dataclass(frozen=True)
class Run:
    """The episodes that count, of one run."""

    lengths: Lengths
    episodes: tuple[Episode, ...]

    @property
    def episode_s(self) -> float:
        """Seconds of an episode that learns from just the tokens of the list.

        Other schedules than ``sync`` choose what they learn from: single episodes have more or less to do.
        """
        seconds = sum(one.wall_s for one in self.episodes)
        return seconds / sum(one.num_tokens for one in self.episodes) * sum(self.lengths.tokens())

    @property
    def median_episode_s(self) -> float:
        """Seconds of an episode where all of them do the same."""
        return median(one.wall_s for one in self.episodes)

    @property
    def path_tokens_per_s(self) -> float:
        """Answered and graded tokens for each second in which the loop waits for them."""
        return median(one.num_tokens / (one.rollout_s + one.reward_s) for one in self.episodes)

    @property
    def engine_idle(self) -> float:
        """The share of the time in which an engine has nothing to do."""
        return 1 - sum(one.engine_busy_s for one in self.episodes) / sum(one.wall_s for one in self.episodes)

    @property
    def trainer_idle(self) -> float:
        """The share of the time in which the trainer has nothing to do."""
        return 1 - sum(one.train_s for one in self.episodes) / sum(one.wall_s for one in self.episodes)


def overrides(lengths: Lengths, schedule: str, num_episodes: int) -> list[str]:
    """What makes the quickstart's configuration the work of the comparison."""
    return [
        f"runtime_args.num_episode={NUM_FIRST + num_episodes + NUM_LAST}",
        f"runtime_args.sample_per_episode={NUM_SAMPLES}",
        f"runtime_args.train_global_batch_size={NUM_SAMPLES}",
        "runtime_args.data_shuffle=False",
        "runtime_args.eval_data_path=null",
        "runtime_args.enable_eval_before_training=False",
        "runtime_args.eval_episode_interval=0",
        "runtime_args.save_episode_interval=0",
        "runtime_args.log_args_dict.enable_tensorboard=False",
        f"runtime_args.rollout_backend=benchmarks.episodes.forced:{ENGINES[lengths.name]}",
        f"models.policy_trainer.load={MODEL}",
        f"models.policy_trainer.optimizer.lr={LEARNING_RATE}",
        f"models.policy.num_inference_per_prompt={NUM_ANSWERS}",
        f"models.policy.max_prompt_tokens_length={MAX_PROMPT_TOKENS}",
        f"models.policy.max_response_tokens_length={lengths.limit}",
        f"models.policy.temperature={TEMPERATURE}",
        *SCHEDULES[schedule],
    ]


def run(questions: Path, output: Path, lengths: Lengths, schedule: str, num_episodes: int) -> Run:
    """One run of the command, from start to end; the numbers of ``num_episodes`` in its middle."""
    command = [sys.executable, "chatlearn/entrypoint.py", "grpo", "--config-file", "template/quickstart.yaml"]
    settings = [f"runtime_args.data_path={questions}", f"runtime_args.output_dir={output}"]
    done = subprocess.run(
        [*command, *settings, *overrides(lengths, schedule, num_episodes)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"the run with schedule {schedule} failed:\n{done.stderr}")
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Run(lengths, tuple(map(episode, lines[NUM_FIRST : NUM_FIRST + num_episodes])))


def episode(line: str) -> Episode:
    """A line of ``metrics.jsonl``."""
    numbers: dict[str, float] = json.loads(line)
    return Episode(
        wall_s=numbers["time/episode"],
        rollout_s=numbers["time/rollout"],
        reward_s=numbers["time/reward"],
        train_s=numbers["time/train"],
        publish_s=numbers["time/publish"],
        engine_busy_s=numbers["rollout/engine_busy_s"],
        num_tokens=numbers["rollout/response_tokens"],
        transfer_s=numbers["sync/seconds"],
        transfer_gb_per_s=numbers["sync/gigabytes_per_s"],
    )
