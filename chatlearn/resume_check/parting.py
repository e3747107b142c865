"""The first place where two values part: numbers, text, tensors, and containers of them, compared to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor

LONGEST_TEXT: Final = 200  # characters of a value that is shown to a person


@dataclass(frozen=True)
class Parting:
    """Where two values part, such as ``[3].reward``, and what each of them has there."""

    place: str
    first: object
    second: object


def parting(first: object, second: object) -> Parting | None:
    """The first place where the two are not the same to the bit; ``None`` where they are.

    >>> parting({"a": [1, 2]}, {"a": [1, 3]})
    Parting(place='.a[1]', first=2, second=3)
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _of_tensors(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return _of_mappings(cast("Mapping[str, object]", first), cast("Mapping[str, object]", second))
    if _is_list(first) and _is_list(second):
        return _of_lists(cast("Sequence[object]", first), cast("Sequence[object]", second))
    # Two numbers may be equal and not the same: 0.0 and -0.0, 1 and 1.0. Two that are no numbers are the same.
    return None if type(first) is type(second) and repr(first) == repr(second) else Parting("", first, second)


def shown(value: object) -> object:
    """The value as JSON can say it, cut off where it is long."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _of_mappings(first: Mapping[str, object], second: Mapping[str, object]) -> Parting | None:
    for key in dict.fromkeys([*first, *second]):
        found = parting(first.get(key), second.get(key))
        if found is not None:
            return Parting(f".{key}{found.place}", found.first, found.second)
    return None


def _of_lists(first: Sequence[object], second: Sequence[object]) -> Parting | None:
    for index, (one, other) in enumerate(zip_longest(first, second)):
        found = parting(one, other)
        if found is not None:
            return Parting(f"[{index}]{found.place}", found.first, found.second)
    return None


def _of_tensors(first: Tensor, second: Tensor) -> Parting | None:
    if first.dtype != second.dtype or first.shape != second.shape:
        return Parting("", first, second)
    differs = (_bits(first) != _bits(second)).any(dim=1)
    if not differs.any():
        return None
    index = int(differs.nonzero()[0])
    where = ", ".join(str(int(axis)) for axis in np.unravel_index(index, first.shape))
    place = f"[{where}] ({int(differs.sum())} of {first.numel()} elements differ)"
    return Parting(place, first.flatten()[index].item(), second.flatten()[index].item())


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of each element [elements, bytes]; zeros of both signs differ, what is no number may be equal."""
    return tensor.contiguous().flatten().view(torch.uint8).view(tensor.numel(), tensor.element_size())
