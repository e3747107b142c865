"""Killing and stopping processes of a run at random moments, and counting afterwards what it did all the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from runs import actors, metrics, wait_until

Deed = Literal["kill an engine", "kill a grader", "stop an engine", "kill a tensor-parallel worker"]
DEEDS: dict[Deed, tuple[str, signal.Signals]] = {
    "kill an engine": ("policy", signal.SIGKILL),
    "kill a grader": ("reward", signal.SIGKILL),
    "stop an engine": ("policy", signal.SIGSTOP),
    "kill a tensor-parallel worker": ("policy", signal.SIGKILL),
}
# An engine is hurt in the middle of its work, a moment after an episode begins; the moment is drawn.
LONGEST_DELAY_S = 1.5


@dataclass(frozen=True)
class Harm:
    """What was done to a run, and when: seconds after the numbers of ``after_episode`` were on disk."""

    deed: Deed
    rank: int
    after_episode: int
    delay_s: float


def harm(output: Path, run: subprocess.Popen[str], deed: Deed, chance: random.Random) -> Harm:
    """Wait for the next episode to begin, and hurt somebody in the middle of it; returns once it was noticed."""
    before = max(metrics(output), default=0)
    wait_until(lambda: max(metrics(output), default=0) > before, run, "the next episode")
    after, delay = max(metrics(output), default=0), chance.uniform(0.0, LONGEST_DELAY_S)
    time.sleep(delay)
    role, number = DEEDS[deed]
    victims = [row for row in actors(output) if row["role"] == role and row["state"] == "running" and row["pid"] > 0]
    victim = chance.choice(sorted(victims, key=lambda row: row["rank"]))
    pid = tensor_parallel_child(victim["pid"], chance) if deed == "kill a tensor-parallel worker" else victim["pid"]
    os.kill(pid, number)
    wait_until(lambda: was_replaced(output, victim["pid"]), run, f"somebody in the place of {victim}")
    return Harm(deed, victim["rank"], after, round(delay, 2))


def tensor_parallel_child(pid: int, chance: random.Random) -> int:
    """One of the workers that an engine started for its ranks."""
    children = psutil.Process(pid).children(recursive=True)
    return chance.choice(sorted(child.pid for child in children if "Worker_TP" in " ".join(child.cmdline())))


def was_replaced(output: Path, pid: int) -> bool:
    """Whether another process sits in the place of this one."""
    return any(row["pid"] == pid and row["state"] == "replaced" for row in actors(output))


def counted(output: Path, episode: int) -> Counter[str]:
    """How many answers each prompt has in an episode."""
    path = output / "rollouts" / f"episode_{episode:06d}.jsonl"
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return Counter(line["prompt_uid"] for line in lines)


def miscounted(output: Path, num_episodes: int, num_prompts: int, num_completions: int) -> list[str]:
    """What is wrong with a run's answers; every prompt belongs to one episode, with all its answers."""
    problems: list[str] = []
    seen: set[str] = set()
    for episode in range(1, num_episodes + 1):
        answers = counted(output, episode)
        if len(answers) != num_prompts or set(answers.values()) != {num_completions}:
            problems.append(f"episode {episode} has {sum(answers.values())} answers to {len(answers)} prompts")
        if seen & answers.keys():
            problems.append(f"episode {episode} asks {sorted(seen & answers.keys())[:3]} again")
        seen |= answers.keys()
    return problems
