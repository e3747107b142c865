"""The line that a person reads after every episode: the numbers that tell whether it goes well, with their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Most telling first, because a narrow terminal shows as many as fit. Fixed widths, so that episodes form columns.
READINGS: Sequence[tuple[str, str]] = (
    ("rollout/reward_mean", "reward {:.3f}"),
    ("time/episode", "{:5.1f} s"),
    ("rollout/response_length_mean", "length {:4.0f} tokens"),
    ("rollout/truncated_ratio", "truncated {:4.0%}"),
    ("policy_trainer/entropy", "entropy {:.2f} nats"),
    ("policy_trainer/grad_norm", "grad norm {:.3f}"),
    ("policy_trainer/loss", "loss {:+.4f}"),
    ("policy_trainer/clip_fraction", "clipped {:5.1%}"),
    ("numerics/rollout_logprob_diff_mean", "engine gap {:.0e} nats"),
    ("rollout/tokens_per_s", "{:,.0f} tokens/s"),
)

# Numbers that are only worth a word when something went wrong.
WARNINGS: Sequence[tuple[str, str]] = (("rule_reward/grader_errors", "GRADER ERRORS {:.0f}"),)

GAP = "  "


def episode_lines(step: int, num_steps: int, metrics: Mapping[str, float], num_columns: int) -> list[str]:
    """One line for the episode, if it trained, and one for each data source that was evaluated."""
    heading = f"episode {step:>{len(str(num_steps))}}/{num_steps}"
    readings = [template.format(metrics[name]) for name, template in READINGS if name in metrics]
    warnings = [template.format(metrics[name]) for name, template in WARNINGS if metrics.get(name)]
    trained = "rollout/reward_mean" in metrics or "policy_trainer/loss" in metrics or bool(warnings)
    lines = [fitting([heading, *warnings, *readings], num_columns)] if trained else []
    return lines + [fitting([heading, *pieces], num_columns) for pieces in evaluation_pieces(metrics)]


def fitting(pieces: Sequence[str], num_columns: int) -> str:
    """As many pieces as fit, at least the first two.

    >>> fitting(["episode 1/9", "reward 0.5", "length 12 tokens"], num_columns=30)
    'episode 1/9  reward 0.5'
    """
    line = GAP.join(pieces[:2])
    for piece in pieces[2:]:
        if len(line) + len(GAP) + len(piece) > num_columns:
            break
        line += GAP + piece
    return line


def evaluation_pieces(metrics: Mapping[str, float]) -> list[list[str]]:
    """``eval/<data source>/<measure>`` grouped by data source, which may itself contain slashes."""
    by_source: dict[str, list[str]] = {}
    for name, value in metrics.items():
        source, _, measure = name.removeprefix("eval/").rpartition("/")
        if name.startswith("eval/") and measure.startswith(("avg@", "pass@")):
            by_source.setdefault(source, [f"evaluation of {source}"]).append(f"{measure} {value:.3f}")
    return list(by_source.values())
