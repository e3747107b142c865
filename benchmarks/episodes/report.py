"""From what was measured to the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.episodes.ours import ONE_ENGINE, Run
from benchmarks.episodes.transfer import Moved
from benchmarks.episodes.work import LENGTHS, LONG, NUM_THREADS, SHORT

AT_LEAST_OF_BARE = 0.95
AT_MOST_OF_PARTS = 1.15
# How many times faster than the peer.
AT_LEAST_OF_PEER: Mapping[tuple[str, str], float] = {
    (LONG.name, "sync"): 1.8,
    (LONG.name, "one_step_off"): 2.0,
    (LONG.name, "async"): 2.0,
    (SHORT.name, "sync"): 1.0,
    (SHORT.name, "one_step_off"): 1.0,
    (SHORT.name, "async"): 1.0,
}


@dataclass(frozen=True)
class Side:
    """One kind of lengths in one round: our runs by schedule, and the seconds of the others, repetition by repetition.

    Bare generation is there by the number of its threads. ``peer_s`` is empty where TRL is not measured.
    """

    runs: Mapping[str, Run]
    bare_s: Mapping[int, Sequence[float]]
    training_s: Sequence[float]
    peer_s: Sequence[float]

    @property
    def generation_s(self) -> Sequence[float]:
        """Bare generation with as many threads as are fastest."""
        return min(self.bare_s.values(), key=median)


# A round is measured in one go: what is compared in it ran one after the other.
Round = Mapping[str, Side]  # by the name of the lengths


def over_rounds(rounds: Iterable[Round], lengths: str, figure: Callable[[Side], float]) -> float:
    """The median of a figure, or of a ratio, over the rounds."""
    return median(figure(one[lengths]) for one in rounds)


def bare_rows(rounds: Sequence[Round]) -> list[str]:
    """(a): each at its fastest, and one engine against one on the same cores."""
    rows: list[str] = []
    pairs: Mapping[str, Callable[[Side], Sequence[float]]] = {
        "sync": lambda side: side.generation_s,
        ONE_ENGINE: lambda side: side.bare_s[NUM_THREADS],
    }
    for name, lengths in LENGTHS.items():
        num_tokens = sum(lengths.tokens())
        for schedule, bare in pairs.items():
            ours_all = [turn[name].runs[schedule].path_tokens_per_s for turn in rounds]
            bare_all = [num_tokens / median(bare(turn[name])) for turn in rounds]
            ratio = median(mine / theirs for mine, theirs in zip(ours_all, bare_all, strict=True))
            target = f"{AT_LEAST_OF_BARE:.2f}" if name == LONG.name else ""
            rows.append(
                f"| {name} | {schedule} | {median(ours_all):,.0f} | {median(bare_all):,.0f} | {ratio:.2f} | {target} |"
            )
    return rows


def transfer_rows(rounds: Sequence[Round], moved: Moved) -> list[str]:
    """(b)"""
    speed, copy_speed = (moved.num_bytes / 1e9 / median(seconds) for seconds in (moved.sent_s, moved.copied_s))
    rows = [
        f"| {moved.num_bytes / 1e6:.0f} MB, one engine in the sender's process | {1000 * median(moved.sent_s):.1f} "
        f"| {speed:.2f} | {copy_speed:.2f} | {speed / copy_speed:.3f} |"
    ]
    episodes = [one for turn in rounds for one in turn[LONG.name].runs["sync"].episodes]
    seconds = median(one.transfer_s for one in episodes)
    speed = median(one.transfer_gb_per_s for one in episodes)
    share = median(one.transfer_s / one.wall_s for one in episodes)
    rows.append(
        f"| {1000 * seconds * speed:.1f} MB, in a run ({100 * share:.1f} % of its episode) | {1000 * seconds:.1f} "
        f"| {speed:.3f} | {copy_speed:.2f} | {speed / copy_speed:.4f} |"
    )
    return rows


def schedule_rows(rounds: Sequence[Round]) -> list[str]:
    """(c)"""
    rows: list[str] = []
    for schedule in rounds[0][LONG.name].runs:
        figures = [turn[LONG.name].runs[schedule] for turn in rounds]
        ratio = median(
            turn[LONG.name].runs["sync"].episode_s / turn[LONG.name].runs[schedule].episode_s for turn in rounds
        )
        rows.append(
            f"| {schedule} | {median(run.episode_s for run in figures):.2f} | {ratio:.2f} "
            f"| {100 * median(run.engine_idle for run in figures):.0f} % "
            f"| {100 * median(run.trainer_idle for run in figures):.0f} % |"
        )
    return rows


def peer_rows(rounds: Sequence[Round]) -> list[str]:
    """(d)"""
    rows: list[str] = []
    for (name, schedule), target in AT_LEAST_OF_PEER.items():
        ours = over_rounds(rounds, name, lambda side, schedule=schedule: side.runs[schedule].episode_s)
        peer = over_rounds(rounds, name, lambda side: median(side.peer_s))
        ratio = over_rounds(
            rounds, name, lambda side, schedule=schedule: median(side.peer_s) / side.runs[schedule].episode_s
        )
        rows.append(f"| {name} | {schedule} | {ours:.2f} | {peer:.2f} | {ratio:.2f} | {target:.1f} |")
    return rows


def parts_rows(rounds: Sequence[Round]) -> list[str]:
    """(e)"""
    rows: list[str] = []
    for name in LENGTHS:
        ours = over_rounds(rounds, name, lambda side: side.runs["sync"].median_episode_s)
        generation = over_rounds(rounds, name, lambda side: median(side.generation_s))
        training = over_rounds(rounds, name, lambda side: median(side.training_s))
        ratio = over_rounds(
            rounds,
            name,
            lambda side: side.runs["sync"].median_episode_s / (median(side.generation_s) + median(side.training_s)),
        )
        target = f"{AT_MOST_OF_PARTS:.2f}" if name == LONG.name else ""
        rows.append(f"| {name} | {ours:.2f} | {generation:.2f} | {training:.2f} | {ratio:.2f} | {target} |")
    return rows


def phase_rows(rounds: Sequence[Round]) -> list[str]:
    """Where the time of a synchronous episode goes."""
    rows: list[str] = []
    for name in LENGTHS:
        episodes = [one for turn in rounds for one in turn[name].runs["sync"].episodes]
        columns = (
            [one.rollout_s for one in episodes],
            [one.reward_s for one in episodes],
            [one.train_s for one in episodes],
            [one.publish_s for one in episodes],
            [one.wall_s for one in episodes],
        )
        rows.append(f"| {name} | {' | '.join(f'{median(column):.2f}' for column in columns)} |")
    return rows


def table(title: str, header: str, rows: Sequence[str]) -> str:
    """A markdown table under a heading."""
    return "\n".join([f"## {title}", "", header, "| --- " * (header.count("|") - 1) + "|", *rows, ""])


def tables(rounds: Sequence[Round], moved: Moved, has_peer: bool) -> str:
    """All of them."""
    peer = table(
        "(d) A whole episode against TRL",
        "| lengths | schedule | ours, s | TRL, s | times faster | at least |",
        peer_rows(rounds) if has_peer else ["| not measured: no `--trl` |  |  |  |  |  |"],
    )
    return "\n".join(
        [
            table(
                "(a) From prompts to graded answers against `vllm.LLM.generate`",
                "| lengths | ours | tokens/s | bare, tokens/s | ratio | at least |",
                bare_rows(rounds),
            ),
            table(
                "(b) Transfer of weights against a copy of the same bytes",
                "| weights | ms | GB/s | a copy, GB/s | ratio |",
                transfer_rows(rounds, moved),
            ),
            table(
                f"(c) Schedules, {LONG.name} lengths",
                "| schedule | episode, s | times faster than sync | engine idle | trainer idle |",
                schedule_rows(rounds),
            ),
            peer,
            table(
                "(e) A synchronous episode against the sum of its bare parts",
                "| lengths | ours, s | bare generation, s | bare forward and backward, s | ratio | at most |",
                parts_rows(rounds),
            ),
            table(
                "Where a synchronous episode's seconds go",
                "| lengths | rollout | reward | train | publish | all |",
                phase_rows(rounds),
            ),
        ]
    )
