"""The long fault test: ``bash scripts/soak.sh --kills 20 --seed 1`` kills and stops processes of real runs, at random.

With ``--what checkpoints`` it is the driver and the trainer that are killed; that is in ``soak_checkpoints.py``.

So many deeds, each kind equally often, spread over runs that must all finish with every prompt counted exactly once.
The table says what was done, when, and what came of it; exit status 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import soak_checkpoints
from runs import ROOT, Launcher, finish, metrics
from sabotage import DEEDS, Deed, Harm, harm, miscounted

NUM_PROMPTS, NUM_COMPLETIONS = 32, 8
HARMS_PER_RUN = 5
EPISODES_PER_HARM = 3  # Enough that the last deed of a run is noticed before its end.
COMMON = (
    f"runtime_args.sample_per_episode={NUM_PROMPTS * NUM_COMPLETIONS}",
    f"runtime_args.train_global_batch_size={NUM_PROMPTS * NUM_COMPLETIONS}",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
    "runtime_args.save_episode_interval=0",
    "runtime_args.engine_timeout_s=10",
    "models.policy.num_gpu=2",
    "models.policy.enforce_eager=True",
)


@dataclass(frozen=True)
class Campaign:
    """Runs of one kind, and what is done to them."""

    name: str
    overrides: tuple[str, ...]
    deeds: tuple[Deed, ...]


CAMPAIGNS = (
    Campaign("two vLLM engines", (), ("kill an engine", "stop an engine", "kill a grader")),
    Campaign(
        "one vLLM engine of two processes",
        ("models.policy.tensor_model_parallel_size=2",),
        ("kill a tensor-parallel worker",),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One run: what was done to it, and what is wrong with it; nothing where all is well."""

    campaign: str
    harms: tuple[Harm, ...]
    num_replaced: int
    largest_gap: float
    seconds: float
    problems: tuple[str, ...]


def runs_of(campaign: Campaign, kills: int, seed: int) -> Iterator[list[Deed]]:
    """The campaign's share of the deeds in random order, a few for each run."""
    deeds = [deed for deed in campaign.deeds for _ in range(max(1, kills // len(DEEDS)))]
    random.Random(f"{campaign.name} {seed}").shuffle(deeds)
    for first in range(0, len(deeds), HARMS_PER_RUN):
        yield deeds[first : first + HARMS_PER_RUN]


def hurt(launcher: Launcher, output: Path, campaign: Campaign, deeds: Sequence[Deed], chance: random.Random) -> Outcome:
    """One run from its start to its end."""
    begun, num_episodes = time.monotonic(), EPISODES_PER_HARM * len(deeds) + 1
    run = launcher.start(output, *COMMON, *campaign.overrides, f"runtime_args.num_episode={num_episodes}")
    harms = tuple(harm(output, run, deed, chance) for deed in deeds)
    ended = finish(run)
    if ended.returncode != 0:
        problems = [f"status {ended.returncode}: {ended.stderr[-1000:]}"]
    else:
        problems = miscounted(output, num_episodes, NUM_PROMPTS, NUM_COMPLETIONS)
    numbers = metrics(output)
    last = numbers[max(numbers)]
    return Outcome(
        campaign=campaign.name,
        harms=harms,
        num_replaced=round(last["rollout/replaced_engines"] + last["rule_reward/replaced_graders"]),
        largest_gap=max(number["numerics/rollout_logprob_diff_mean"] for number in numbers.values()),
        seconds=time.monotonic() - begun,
        problems=tuple(problems),
    )


def table(outcomes: Sequence[Outcome], kills: int, seed: int) -> str:
    """What was done and what came of it, for people."""
    num_deeds = sum(len(outcome.harms) for outcome in outcomes)
    num_wrong = sum(bool(outcome.problems) for outcome in outcomes)
    lines = [
        "# Processes killed and stopped at random",
        "",
        f"`bash scripts/soak.sh --kills {kills} --seed {seed}`",
        "",
        f"- date: {time.strftime('%Y-%m-%d')}",
        f"- {num_deeds} deeds in {len(outcomes)} runs; {num_wrong} runs went wrong",
        "- a run is right when it finishes and every prompt belongs to one episode, with all its answers",
        "",
        "| run | deeds: rank (after episode + seconds) | replaced | largest mean gap, nats | seconds | outcome |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, outcome in enumerate(outcomes, start=1):
        deeds = "; ".join(f"{one.deed} {one.rank} ({one.after_episode} + {one.delay_s} s)" for one in outcome.harms)
        lines.append(
            f"| {number}: {outcome.campaign} | {deeds} | {outcome.num_replaced} | {outcome.largest_gap:.0e} "
            f"| {outcome.seconds:.0f} | {'; '.join(outcome.problems) or 'finished, all counted once'} |"
        )
    return "\n".join([*lines, ""])


def hurt_engines(data: Path, folder: Path, kills: int, seed: int, table_file: Path) -> bool:
    """Run every campaign; whether all went well. The table is written after each run."""
    outcomes: list[Outcome] = []
    for campaign in CAMPAIGNS:
        chance = random.Random(seed)
        for deeds in runs_of(campaign, kills, seed):
            outcomes.append(hurt(Launcher(data), folder / str(len(outcomes)), campaign, deeds, chance))
            table_file.write_text(table(outcomes, kills, seed))
            sys.stderr.write(f"run {len(outcomes)}: {'; '.join(outcomes[-1].problems) or 'all counted once'}\n")
    return not any(outcome.problems for outcome in outcomes)


SOAKS = {
    "engines": (hurt_engines, "soak.md"),
    "checkpoints": (soak_checkpoints.kill_savers, "soak_checkpoints.md"),
}


def main() -> int:
    """Run what is asked for; a machine that stops leaves the table as far as it came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many processes are hurt (20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--what", choices=sorted(SOAKS), default="engines", help="who is hurt (engines and graders)")
    parser.add_argument("--output", type=Path, help="the table (in benchmarks/results)")
    options = parser.parse_args()
    soak, name = SOAKS[options.what]
    output = options.output or ROOT / "benchmarks" / "results" / name
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare = ["prepare", "arithmetic", "--local_dir", str(data)]
        subprocess.run([sys.executable, "-m", "chatlearn", *prepare], cwd=ROOT, check=True)
        return int(not soak(data, Path(folder), options.kills, options.seed, output))


if __name__ == "__main__":
    sys.exit(main())
