"""What the gate found, in words that a person can act on."""

from __future__ import annotations

from dataclasses import dataclass

from chatlearn.numerics.gap import Gap

# What a change leaves of the gap at most, for its cause to be named though something remains.
MOST_OF_IT = 0.25

# And at most for it to be the explanation: else a gap just above the tolerance would be laid to the first small change.
HALF_OF_IT = 0.5

# What is left where rounding is all that is left. In half precision there is more, and other values may fit better.
HARDLY_ANY = 0.02


@dataclass(frozen=True)
class Trial:
    """One thing that was changed, and the gap that was left.

    ``finding`` says what is the matter if this explains the gap, ``advice`` what to do then. ``proven`` says whether it
    does where that is seen by other means than a gap that is within tolerance.
    """

    cause: str
    change: str
    finding: str
    advice: str
    gap: Gap
    proven: bool = False

    def leaves_nothing(self, before: Gap) -> bool:
        """Whether no other trial could explain more."""
        return self.proven or self.gap.mean <= HARDLY_ANY * before.mean

    def explains(self, before: Gap, tolerance: float) -> bool:
        """Whether nothing needs to be looked for after this."""
        return self.proven or (self.gap.within(tolerance) and self.gap.mean <= HALF_OF_IT * before.mean)


@dataclass(frozen=True)
class Verdict:
    """The gap between engine and trainer as they are, and what was learned where it is above the tolerance.

    ``explanation`` is the trial that explains it; ``None`` where engine and trainer agree or nobody knows why not.
    """

    gap: Gap
    tolerance: float
    explanation: Trial | None = None
    trials: tuple[Trial, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the run can be trusted."""
        return self.gap.within(self.tolerance)

    @property
    def cause(self) -> str | None:
        """The name of the cause, where one was found."""
        return None if self.explanation is None else self.explanation.cause

    def __str__(self) -> str:
        measured = f"{self.gap}; tolerance {self.tolerance:.0e}"
        if self.agrees:
            return f"engine and trainer agree: {measured}"
        lines = [f"engine and trainer disagree about the log-probabilities of sampled tokens: {measured}"]
        if self.explanation is None:
            lines.append("none of the known causes explains it. What was tried, and the mean gap that was left:")
            lines += [f"  {trial.change}: {trial.gap.mean:.0e}" for trial in self._telling()]
        else:
            lines += explained(self.explanation, self.tolerance)
        return "\n".join([*lines, *self.remarks])

    def _telling(self) -> list[Trial]:
        """Of each cause the trial that came nearest."""
        best: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.cause not in best or trial.gap.mean < best[trial.cause].gap.mean:
                best[trial.cause] = trial
        return list(best.values())


def explained(trial: Trial, tolerance: float) -> list[str]:
    """The lines about a cause that was found."""
    rest = f" ({trial.change}: {trial.gap.mean:.0e} nats are left)" if trial.change else ""
    lines = [f"cause: {trial.cause}: {trial.finding}{rest}", f"what to do: {trial.advice}"]
    if not trial.proven and not trial.gap.within(tolerance):
        lines.append("this explains most of the gap, but not all: mend it, and see what the next start says")
    return lines
