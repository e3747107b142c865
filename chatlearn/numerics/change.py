"""One thing that the trainer does differently, to see whether it then says what the engine says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from chatlearn.device import DtypeName


@dataclass(frozen=True)
class Distribution:
    """What is sampled from: the softmax at a temperature, cut down and normalised again.

    ``top_p`` 1, ``top_k`` 0 and ``min_p`` 0 cut nothing off.

    >>> str(Distribution(0.6, top_p=0.95, top_k=20))
    'temperature 0.6, top_p 0.95, top_k 20'
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens cannot be sampled."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def __str__(self) -> str:
        parts = [f"temperature {self.temperature:.4g}"]
        parts += [f"top_p {self.top_p:.4g}"] if self.top_p < 1 else []
        parts += [f"top_k {self.top_k}"] if self.top_k > 0 else []
        parts += [f"min_p {self.min_p:.4g}"] if self.min_p > 0 else []
        return ", ".join(parts)


Source = Literal["stored", "zero"]


@dataclass(frozen=True)
class OtherWeights:
    """These parameters, by their names in memory, as the model directory has them, or as zeros; ``names`` None: all."""

    source: Source
    names: frozenset[str] | None = None


@dataclass(frozen=True)
class Change:
    """How a pass differs from the one the trainer learns with; what is ``None`` or False stays as it is.

    ``plain_kernels`` takes transformers' own attention and experts, for sequences that stand alone in their
    micro-batch. ``replays_routes`` settles whether tokens go to the experts that the engine named.
    """

    distribution: Distribution | None = None
    plain_kernels: bool = False
    replays_routes: bool | None = None
    dtype: DtypeName | None = None
    weights: OtherWeights | None = None


NO_CHANGE = Change()
