"""What rollouts, transfer and schedules cost beside bare vLLM, a plain copy and TRL: one set of tables, on a CPU.

    python benchmarks/rollout.py [--episodes 5] [--rounds 1] [--trl FOLDER] [--output FILE]

(a) Generated tokens per second from prompts to graded answers against ``vllm.LLM.generate`` with the same requests;
(b) transfer of weights against a copy of the same bytes; (c) the schedules on long-tailed lengths; (d) whole episodes
against TRL 1.16; (e) an episode against the sum of its bare parts. Ours are whole runs of the real command; the others
are programs in ``benchmarks/episodes``, where the work is written down too. What is compared runs one after the other
within a round, and ratios are medians over rounds. Nothing else should run on the machine.

TRL need not stay: ``pip install --no-deps --target FOLDER trl==1.16.0 datasets pandas multiprocess xxhash`` and what
they miss; without ``--trl`` part (d) is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import platform
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata

from benchmarks.episodes import ours
from benchmarks.episodes.children import Others
from benchmarks.episodes.report import Round, Side, tables
from benchmarks.episodes.work import (
    LENGTHS,
    LONG,
    NUM_ANSWERS,
    NUM_PROMPTS,
    NUM_THREADS,
    SHORT,
    Lengths,
    write_questions,
)

RESULTS = Path(__file__).parent / "results" / "rollout_cpu.md"

# Partial rollout is for long answers; short ones end in their first round.
SCHEDULES = {LONG.name: tuple(ours.SCHEDULES), SHORT.name: ("sync", ours.ONE_ENGINE, "one_step_off", "async")}


def measure(others: Others, folder: Path, lengths: Lengths, num_episodes: int) -> Side:
    """Everything about one kind of lengths, one after the other."""
    generation_s = {
        num_threads: said(lengths, f"bare generation, {num_threads} threads", others.generation(lengths, num_threads))
        for num_threads in range(1, NUM_THREADS + 1)
    }
    runs: dict[str, ours.Run] = {}
    for schedule in SCHEDULES[lengths.name]:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            run = ours.run(others.questions, Path(output), lengths, schedule, num_episodes)
        runs[schedule] = run
        said(lengths, f"ours, {schedule}", [one.wall_s for one in run.episodes])
    training_s = said(lengths, "bare forward and backward", others.training(lengths))
    peer_s = [] if others.trl is None else said(lengths, "TRL", others.peer(lengths))
    return Side(runs, generation_s, training_s, peer_s)


def said(lengths: Lengths, what: str, seconds: list[float]) -> list[float]:
    """Tell who waits what was measured, and how busy the machine was."""
    figures = " ".join(f"{one:.2f}" for one in seconds)
    print(
        f"{datetime.now(UTC):%H:%M:%S} {lengths.name}, {what}: {figures} s; load {os.getloadavg()[0]:.1f}",
        file=sys.stderr,
    )
    return seconds


def introduction(options: argparse.Namespace, rounds: Sequence[Round]) -> list[str]:
    """What was measured, on what."""
    packages = ["torch", "transformers", "ray"]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    trl = "" if options.trl is None else " --trl FOLDER"
    lines = [
        "# The rollout on a CPU",
        "",
        f"`python benchmarks/rollout.py --episodes {options.episodes} --rounds {options.rounds}{trl}`",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- hardware: {platform.machine()}, {os.cpu_count()} cores, {NUM_THREADS} in use by each side",
        f"- versions: Python {platform.python_version()}, {versions}",
        f"- an episode: {NUM_PROMPTS} prompts, {NUM_ANSWERS} answers to each, one optimizer step",
    ]
    for lengths in LENGTHS.values():
        tokens = lengths.tokens()
        lines.append(
            f"- {lengths.name} lengths: {min(tokens)} to {max(tokens)} tokens, mean {sum(tokens) / len(tokens):.0f}"
        )
    lines.append(f"- ratios are medians over {len(rounds)} round(s) of medians over {options.episodes} episodes")
    return [*lines, ""]


def main() -> None:
    """Measure everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=5, help="of each run, and repetitions of the other sides")
    parser.add_argument("--rounds", type=int, default=1, help="how often everything is measured")
    parser.add_argument("--trl", type=Path, help="the folder that TRL 1.16 is installed in")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        others = Others(write_questions(folder), options.episodes, options.trl)
        moved = others.transfer()
        rounds: list[Round] = [
            {name: measure(others, folder, lengths, options.episodes) for name, lengths in LENGTHS.items()}
            for _ in range(options.rounds)
        ]
    text = "\n".join([*introduction(options, rounds), tables(rounds, moved, has_peer=options.trl is not None)])
    print(text)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
