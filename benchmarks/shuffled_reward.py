"""Does the curve rise because of the reward? The quickstart's run beside a control whose reward knows nothing.

    python benchmarks/shuffled_reward.py [--output DIR] [key=value ...]

The control gives each answer a coin's reward that depends on the answer alone and comes up as often as a right answer
does at the beginning. The real grader then judges the answers that both runs wrote down. Prints a table and writes it
to ``benchmarks/results/shuffled_reward.md``; exits with 1 when the real run does not rise or the control does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import numpy as np

from chatlearn.records import Completion, Prompt, Rollout
from chatlearn.reward.grade import Grader

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "shuffled_reward.md"
NUM_EPISODES = 20
LAST = 5
COIN_CHANCE = 0.35  # About the share that the embedded model solves before training.
MIN_RISE = 0.35  # What the quickstart must show.
MAX_CONTROL_RISE = 0.1  # Three standard errors of the difference of two shares of 256 answers each.


def coin(prompt: Prompt, completion: Completion) -> float:
    """A reward without meaning: deterministic, and the same for the same answer."""
    text = f"{prompt.uid}\0{completion.text}".encode()
    draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return float(draw < COIN_CHANCE)


@dataclass(frozen=True)
class Outcome:
    """What one run shows: the mean of the reward it was given, and the share of answers that are really right."""

    name: str
    first_reward: float
    last_rewards: float  # mean over the last five episodes
    first_right: float
    last_right: float

    @property
    def rise(self) -> float:
        """By how much the share of right answers grew."""
        return self.last_right - self.first_right


def run(name: str, output: Path, overrides: list[str]) -> Outcome:
    """Train without evaluation, then judge what was answered."""
    keys = [f"runtime_args.output_dir={output}", f"runtime_args.num_episode={NUM_EPISODES}"]
    keys += ["runtime_args.eval_episode_interval=0", "runtime_args.enable_eval_before_training=False"]
    command = [sys.executable, "chatlearn/entrypoint.py", "grpo", "--config-file", "template/quickstart.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *keys, *overrides], cwd=ROOT, env=environment, check=True)
    episodes = [read_rollouts(output, episode) for episode in range(1, NUM_EPISODES + 1)]
    rewards = [mean(reward for _, reward in lines) for lines in episodes]
    right = judge([[rollout for rollout, _ in lines] for lines in episodes])
    return Outcome(name, rewards[0], mean(rewards[-LAST:]), right[0], mean(right[-LAST:]))


def read_rollouts(output: Path, episode: int) -> list[tuple[Rollout, float]]:
    """The answers of an episode with the reward each was given."""
    path = output / "rollouts" / f"episode_{episode:06d}.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [(as_rollout(line), line["reward"]) for line in lines]


def as_rollout(line: dict[str, Any]) -> Rollout:
    """One answer as the grader takes it; only texts matter to it."""
    nothing = np.zeros(0, np.int32)
    prompt = Prompt(line["prompt_uid"], nothing, line["prompt"], line["data_source"], line["ground_truth"])
    silence = np.zeros(0, np.float32)
    return Rollout(prompt, (Completion(nothing, silence, line["response"], line["finish_reason"], ()),))


def judge(episodes: list[list[Rollout]]) -> list[float]:
    """The share of right answers of each episode, by the real grader."""
    with closing(Grader()) as grader:
        return [mean(group.scores[0].value for group in grader.grade(rollouts)) for rollouts in episodes]


def table(outcomes: list[Outcome]) -> str:
    """A table in Markdown."""
    columns = ["run", "reward, episode 1", f"reward, last {LAST}", "right, episode 1", f"right, last {LAST}"]
    rows = [
        [row.name, *(f"{value:.3f}" for value in (row.first_reward, row.last_rewards, row.first_right, row.last_right))]
        for row in outcomes
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/shuffled_reward"))
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    data = ROOT / "dataset" / "arithmetic"
    preprocessor = "chatlearn/data/data_preprocess/arithmetic.py"
    subprocess.run([sys.executable, preprocessor, "--local_dir", str(data)], cwd=ROOT, check=True)
    real = run("graded answers", asked.output / "graded", asked.overrides)
    control = run("coin", asked.output / "coin", [coin_key(), *asked.overrides])
    text = table([real, control])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(
        f"# Real reward and a control without meaning\n\n`python benchmarks/shuffled_reward.py`\n\n{text}\n"
    )
    sys.stdout.write(text + "\n")
    return 0 if real.rise >= MIN_RISE and control.rise < MAX_CONTROL_RISE else 1


def coin_key() -> str:
    """The key that makes the coin a run's training reward."""
    return "models.reward.function=benchmarks.shuffled_reward:coin"


if __name__ == "__main__":
    sys.exit(main())
