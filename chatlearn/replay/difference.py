"""How far two computations of one step are apart: in the loss, and in the gradient of every parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from safetensors import safe_open

from chatlearn.records import Sample

if TYPE_CHECKING:
    from torch import Tensor

# The loss sums terms of the size of the advantages, of both signs; where they cancel out, so do their digits.
LOSS_FLOOR: Final = 0.1
TINY: Final = 1e-30  # where all is zero: nothing differs, and nothing is divided by zero


@dataclass(frozen=True)
class Bound:
    """How far two computations may be apart, relative to a parameter's gradient or to ``floor`` times the whole one.

    The floor is for parameters whose gradient is next to nothing beside the others': what is lost there, nobody misses.
    """

    tolerance: float
    floor: float


# float32 sums in another order differ by some 1e-7 of their size, through tens of layers by some 1e-6.
SAME_NUMBERS: Final = Bound(tolerance=1e-5, floor=1e-3)
# bfloat16 keeps 8 bits. Measured: 0.05 on a dense model and 0.25 on a mixture of experts, whose routers decide
# otherwise where two experts are about as good. Beyond a half it is another gradient, and no number format's fault.
SAME_DIRECTION: Final = Bound(tolerance=0.5, floor=0.1)


@dataclass(frozen=True)
class Difference:
    """Relative differences, and the parameter whose gradient differs most."""

    loss_rel: float
    grad_rel: float
    worst: str

    def within(self, tolerance: float) -> bool:
        """Whether both are at most ``tolerance``; what is not a number never is."""
        return self.loss_rel <= tolerance and self.grad_rel <= tolerance


def loss_scale(samples: Sequence[Sample]) -> float:
    """The mean size of an advantage over all loss tokens: what a token's loss is made of."""
    num_loss_tokens = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    total = sum(float(np.abs(sample.advantages[1:][sample.loss_mask[1:]]).sum()) for sample in samples)
    return total / max(num_loss_tokens, 1)


def loss_difference(base: float, other: float, scale: float) -> float:
    """``|dl| / max(|l|, 0.1 scale)``.

    >>> loss_difference(2.0, 2.5, scale=1.0)
    0.25
    """
    return abs(other - base) / max(abs(base), LOSS_FLOOR * scale, TINY)


def gradient_difference(base: Path, other: Path, floor: float) -> tuple[float, str]:
    """The largest ``||dg|| / max(||g||, floor ||g_all||)`` of all parameters, and the name of that one.

    The files are safetensors; two tensors are in memory at a time. A parameter that only one of them has differs by
    infinity.
    """
    with _open(base) as ours, _open(other) as theirs:
        names, other_names = set[str](ours.keys()), set[str](theirs.keys())
        strangers = sorted(names ^ other_names)
        if strangers:
            return math.inf, strangers[0]
        norms = {name: norm(ours.get_tensor(name)) for name in sorted(names)}
        least = max(floor * math.hypot(*norms.values()), TINY)
        worst, largest = "", -1.0
        for name, size in norms.items():
            relative = norm(theirs.get_tensor(name).double() - ours.get_tensor(name).double()) / max(size, least)
            if not relative <= largest:  # also what is not a number
                worst, largest = name, relative
                if math.isnan(relative):
                    break
        return largest, worst


def norm(values: Tensor) -> float:
    """L2 norm in double precision."""
    return float(values.double().norm())


def _open(path: Path) -> Any:
    """An open file; it is a context manager, which its stubs do not say, hence ``Any``."""
    return cast("Any", safe_open(path, framework="pt", device="cpu"))
