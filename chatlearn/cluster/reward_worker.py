"""The shell around a grader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatlearn.cluster.seat import Arrival, Seat, arrive, take_seat

if TYPE_CHECKING:
    from chatlearn.records import Graded, Prompt, Rollout


class RewardWorker:
    """One replica of the grader."""

    def __init__(self, seat: Seat) -> None:
        take_seat(seat)

    def arrive(self) -> Arrival:
        """Tell where this process is."""
        return arrive()

    def open(self, reward: str | None, deadline_s: float, num_processes: int) -> None:
        """Build the grader here, with its own processes."""
        from chatlearn.reward.grade import Grader

        self._grader = Grader(reward, deadline_s, num_processes)

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """Judge every completion."""
        return self._grader.grade(rollouts)

    def grade_gold(self, prompts: Sequence[Prompt]) -> list[str]:
        """Try the grader on the gold answers themselves; return a line for each one it cannot grade."""
        return self._grader.grade_gold(prompts)

    def close(self) -> None:
        """Stop the grading processes."""
        self._grader.close()
