"""Climb the ladder: measure every way of computing a recorded step, and say how far each is from the base."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from chatlearn.checkpoint.capsule import readable_numbers
from chatlearn.errors import RunError
from chatlearn.models.pretrained import read_configuration
from chatlearn.records import Sample
from chatlearn.replay.difference import (
    SAME_DIRECTION,
    SAME_NUMBERS,
    Bound,
    Difference,
    gradient_difference,
    loss_difference,
    loss_scale,
)
from chatlearn.replay.ladder import Ladder, LeftOut, Rung, by_ranks
from chatlearn.replay.measure import Measured, measure_and_keep
from chatlearn.replay.ranks import Ranks, open_ranks
from chatlearn.replay.trial import Trial

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One way beside the base."""

    name: str
    difference: Difference
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it agrees with the base."""
        return self.difference.within(self.tolerance)


@dataclass(frozen=True)
class Comparison:
    """The whole ladder, measured."""

    base: Measured
    variants: tuple[Row, ...]
    precision: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]

    def failures(self) -> list[str]:
        """A sentence for each way that does not agree with the base."""
        return [
            f"'{row.name}' differs from the base by {row.difference.loss_rel:.1e} in the loss and "
            f"{row.difference.grad_rel:.1e} in the gradient of {row.difference.worst}, more than {row.tolerance:.0e}"
            for row in (*self.variants, *self.precision)
            if not row.passed
        ]

    def document(self) -> dict[str, object]:
        """As JSON says it."""
        return {
            "base": readable_numbers(vars(self.base)),
            "variants": [{"name": row.name, **readable_numbers(vars(row.difference))} for row in self.variants],
            "precision": [
                {"name": row.name, **readable_numbers(vars(row.difference)), "tolerance": row.tolerance}
                for row in self.precision
            ],
            "tolerance": SAME_NUMBERS.tolerance,
            "left_out": [asdict(entry) for entry in self.left_out],
        }


def climb(ladder: Ladder, samples: Sequence[Sample], say: Say) -> Comparison:
    """Measure the base, then all else; groups of ranks are started one after the other, each for all of its size.

    Gradients lie in a temporary folder, that of the base and one other at a time. Raises ``RunError`` when that of the
    base is not finite, for then there is nothing to compare with.
    """
    trial, modules = ladder.base.trial, needed_modules(ladder.base.trial)
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="chatlearn-replay-") as folder:
        yardstick: Yardstick | None = None
        for num_ranks, rungs in by_ranks(ladder.rungs()).items():
            with open_ranks(num_ranks, trial.device_kind, modules) as ranks:
                yardstick = yardstick or open_yardstick(ranks, ladder, samples, Path(folder))
                for rung in rungs:
                    bound = SAME_DIRECTION if rung in ladder.precision else SAME_NUMBERS
                    rows[rung.name] = Row(rung.name, yardstick.hold(ranks, rung, bound), bound.tolerance)
                    say(f"{len(rows)} of {len(ladder.rungs())}: {rung.name}")
    assert yardstick is not None, "a ladder has rungs of one rank, and they come first"
    return Comparison(
        base=yardstick.base,
        variants=tuple(rows[rung.name] for rung in ladder.variants),
        precision=tuple(rows[rung.name] for rung in ladder.precision),
        left_out=ladder.left_out,
    )


@dataclass(frozen=True)
class Yardstick:
    """What every way is held against: the base's numbers, its gradients in a file, and the size of a token's loss."""

    base: Measured
    gradient_file: Path
    loss_scale: float

    def hold(self, ranks: Ranks, rung: Rung, bound: Bound) -> Difference:
        """Compute the step in this way and tell how far it is from the base."""
        file = self.gradient_file.with_name("other.safetensors")
        measured = ranks.run(measure_and_keep, rung.trial, file)
        in_gradient, worst = gradient_difference(self.gradient_file, file, bound.floor)
        return Difference(loss_difference(self.base.loss, measured.loss, self.loss_scale), in_gradient, worst)


def open_yardstick(ranks: Ranks, ladder: Ladder, samples: Sequence[Sample], folder: Path) -> Yardstick:
    file = folder / "base.safetensors"
    base = ranks.run(measure_and_keep, ladder.base.trial, file)
    if not (math.isfinite(base.loss) and math.isfinite(base.grad_norm)):
        raise RunError(
            f"loss {base.loss} and gradient norm {base.grad_norm} of the recorded step are not finite, so there is "
            "nothing to compare; replay it without --compare, which names the parameters"
        )
    return Yardstick(base, file, loss_scale(samples))


def needed_modules(trial: Trial) -> list[str]:
    """What the ranks import, with the model's own code, which transformers would load only when it is built."""
    described = read_configuration("the capsule", trial.model.path, trust_remote_code=trial.model.trust_remote_code)
    model_type: str = described.model_type
    return ["chatlearn.replay.measure", f"transformers.models.{model_type}.modeling_{model_type}"]
