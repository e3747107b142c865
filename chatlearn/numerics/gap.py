"""How far two streams of log-probabilities of the same tokens are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatlearn.records import FloatStream, Sample


@dataclass(frozen=True)
class Gap:
    """Absolute differences in nats, over the tokens of answers; not a number where one of them is not."""

    mean: float
    largest: float
    num_tokens: int

    def within(self, tolerance: float) -> bool:
        """Whether this is rounding; what is not a number is not, and nothing at all shows nothing."""
        return self.num_tokens > 0 and self.mean <= tolerance

    def __str__(self) -> str:
        return f"mean gap {self.mean:.0e} nats, largest {self.largest:.0e}, over {self.num_tokens} tokens"


def gap_between(samples: Sequence[Sample], streams: Sequence[FloatStream]) -> Gap:
    """The gap between the engine's log-probabilities, which the samples carry, and ``streams``, by token as they."""
    return gap_of(differences(samples, streams))


def gap_of(apart: NDArray[np.float64]) -> Gap:
    """The gap of differences; without any token there is none."""
    distances = np.abs(apart)
    if distances.size == 0:
        return Gap(0.0, 0.0, 0)
    return Gap(float(distances.mean()), float(distances.max()), distances.size)


def differences(samples: Sequence[Sample], streams: Sequence[FloatStream]) -> NDArray[np.float64]:
    """Engine minus trainer at every token of an answer, all samples end to end."""
    parts = [
        sample.rollout_logprobs[sample.loss_mask].astype(np.float64) - stream[sample.loss_mask]
        for sample, stream in zip(samples, streams, strict=True)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def pattern(samples: Sequence[Sample], apart: NDArray[np.float64], tolerance: float) -> str:
    """Where the differences are, for a person who must go on without a known cause."""
    lengths = [int(sample.loss_mask.sum()) for sample in samples]
    ends = np.cumsum(lengths)
    first = [end - length for end, length in zip(ends, lengths, strict=True) if length]
    distances = np.abs(apart)
    return (
        f"{np.mean(~(distances <= tolerance)):.0%} of the tokens are further apart than the tolerance; the engine's "
        f"number is the higher one at {np.mean(apart > 0):.0%}; at the first token of an answer the mean gap is "
        f"{distances[first].mean():.0e}, in the last tenth of all answers "
        f"{_late(distances, ends, lengths):.0e}"
    )


def _late(distances: NDArray[np.float64], ends: NDArray[np.int64], lengths: Sequence[int]) -> float:
    late = [distances[end - max(1, length // 10) : end] for end, length in zip(ends, lengths, strict=True) if length]
    return float(np.concatenate(late).mean())
