"""``bash scripts/soak.sh --what checkpoints``: runs that save after every episode are killed again and again.

Driver and trainer ranks are killed at random moments, many of them inside a save, each time followed by the same
command. A run is right when every life left all published checkpoints and no process, and its end is to the bit that of
a run of the same length that nobody disturbed.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from killing import DEEDS, Deed, Kill, episodes_for, kill
from runs import Launcher, finish

from chatlearn.resume_check.comparison import compare_runs

KILLS_PER_RUN = 5
# What makes a life short: most of it is its start.
COMMON = (
    "runtime_args.rollout_backend=transformers",
    "runtime_args.sample_per_episode=16",
    "runtime_args.train_global_batch_size=16",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
    "runtime_args.save_episode_interval=1",
    "runtime_args.log_args_dict.enable_tensorboard=False",
    "models.policy_trainer.save_hf=True",
    "models.policy.max_response_tokens_length=16",
    "models.reward.num_cpu=1",
)


@dataclass(frozen=True)
class Campaign:
    """Runs of one kind; ``keep`` is how many checkpoints they keep, 0 for all."""

    name: str
    keep: int
    overrides: tuple[str, ...] = ()


CAMPAIGNS = (
    Campaign("dense, all checkpoints kept", keep=0),
    Campaign(
        "mixture of experts, two kept",
        keep=2,
        overrides=("models.policy_trainer.load=embedded/tiny_qwen3_moe", "models.policy_trainer.groupgemm=True"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One run: its kills, the seconds of its lives, and what is wrong with it; nothing where all is well."""

    campaign: str
    kills: tuple[Kill, ...]
    seconds: float
    problems: tuple[str, ...]


def kill_savers(data: Path, folder: Path, kills: int, seed: int, table_file: Path) -> bool:
    """Run every campaign; whether all went well. The table is written after each run."""
    outcomes: list[Outcome] = []
    for number, campaign in enumerate(CAMPAIGNS):
        share = kills // len(CAMPAIGNS) + (number < kills % len(CAMPAIGNS))
        chance = random.Random(f"{campaign.name} {seed}")
        for deeds in runs_of(share, chance):
            outcomes.append(survive(Launcher(data), folder / str(len(outcomes)), campaign, deeds, chance))
            table_file.write_text(table(outcomes, kills, seed))
            sys.stderr.write(f"run {len(outcomes)}: {'; '.join(outcomes[-1].problems) or 'equal to the bit'}\n")
    return not any(outcome.problems for outcome in outcomes)


def runs_of(kills: int, chance: random.Random) -> Iterator[list[Deed]]:
    """So many deeds in random order, each kind as often as the others, a few for each run."""
    deeds = [DEEDS[number % len(DEEDS)] for number in range(kills)]
    chance.shuffle(deeds)
    for first in range(0, kills, KILLS_PER_RUN):
        yield deeds[first : first + KILLS_PER_RUN]


def survive(
    launcher: Launcher, folder: Path, campaign: Campaign, deeds: Sequence[Deed], chance: random.Random
) -> Outcome:
    """One run with its kills, its end, and the twin that nobody disturbed."""
    begun = time.monotonic()
    overrides = (
        *COMMON,
        *campaign.overrides,
        f"runtime_args.num_episode={episodes_for(deeds)}",
        f"runtime_args.keep_checkpoints={campaign.keep}",
    )
    output, twin = folder / "killed", folder / "twin"
    kills = tuple(kill(output, launcher.start(output, *overrides), deed, chance, campaign.keep) for deed in deeds)
    problems = [problem for one in kills for problem in one.problems]
    for run in (output, twin):
        ended = finish(launcher.start(run, *overrides))
        if ended.returncode != 0:
            problems.append(f"{run.name} ended with status {ended.returncode}: {ended.stderr[-1000:]}")
    if not problems:
        difference = compare_runs(twin, output).difference
        problems += [str(difference)] if difference else []
        shutil.rmtree(folder)
    return Outcome(campaign.name, kills, time.monotonic() - begun, tuple(problems))


def who(one: Kill) -> str:
    """The deed, with the number of the rank."""
    return one.deed.replace("rank", f"rank {one.rank}")


def table(outcomes: Sequence[Outcome], kills: int, seed: int) -> str:
    """What was done and what came of it, for people."""
    done = [one for outcome in outcomes for one in outcome.kills]
    num_wrong = sum(bool(outcome.problems) for outcome in outcomes)
    lines = [
        "# Driver and trainer killed at random, also while they save",
        "",
        f"`bash scripts/soak.sh --what checkpoints --kills {kills} --seed {seed}`",
        "",
        f"- date: {time.strftime('%Y-%m-%d')}",
        f"- {len(done)} kills in {len(outcomes)} runs, {sum(one.unfinished != '-' for one in done)} of them while a "
        f"checkpoint was in the making; {num_wrong} runs went wrong",
        "- a run is right when no published checkpoint is ever lost, no process stays, and its end is to the bit that "
        "of a run that nobody disturbed: answers, metrics, weights, optimizer, random states",
        "",
        "| run | kills: who (last episode on the disk; checkpoint in the making) | seconds | outcome |",
        "| --- | --- | --- | --- |",
    ]
    for number, outcome in enumerate(outcomes, start=1):
        told = "; ".join(f"{who(one)} ({one.episode}; {one.unfinished})" for one in outcome.kills)
        lines.append(
            f"| {number}: {outcome.campaign} | {told} | {outcome.seconds:.0f} "
            f"| {'; '.join(outcome.problems) or 'equal to the bit'} |"
        )
    return "\n".join([*lines, ""])
