"""Proof that an update was complete: every tensor the engine expects arrived once, in its shape, and no other did."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from chatlearn.errors import WeightTransferError

# Enough names to recognise what they have in common; a whole model would not fit on a screen.
MAX_NAMES_SHOWN = 3


class ArrivalLedger:
    """Keeps the books of one engine over its updates.

    ``expected`` maps the name of every tensor in the engine's checkpoint to its shape. ``version`` is that of the last
    complete update; ``None`` while one is under way, and after one that failed.
    """

    def __init__(self, expected: Mapping[str, tuple[int, ...]], version: int) -> None:
        self._expected = expected
        self.version: int | None = version
        self._arriving: int | None = None
        self._arrived: set[str] = set()

    def begin(self, version: int) -> None:
        """Open the books for ``version``; an unfinished update before it is forgotten."""
        self.version = None
        self._arriving = version
        self._arrived = set()

    def enter(self, info: Mapping[str, Any]) -> None:
        """Check the tensors of one ``UpdateWeights`` by name and shape, before they are loaded."""
        if self._arriving is None:
            raise WeightTransferError("weights arrived outside an update: BeginUpdate must come first")
        for name, shape in zip(info["names"], info["shapes"], strict=True):
            self._enter_tensor(name, tuple(shape))

    def finish(self, version: int) -> None:
        """Close the books; raises ``WeightTransferError`` where something is missing."""
        if self._arriving != version:
            raise WeightTransferError(f"update {version} ended while update {self._arriving} was under way")
        missing = [name for name in self._expected if name not in self._arrived]
        if missing:
            more = f" and {len(missing) - MAX_NAMES_SHOWN} more" if len(missing) > MAX_NAMES_SHOWN else ""
            raise WeightTransferError(
                f"update {version} did not bring {', '.join(missing[:MAX_NAMES_SHOWN])}{more}; the engine expects "
                f"{len(self._expected)} tensors and {len(self._arrived)} arrived"
            )
        self._arriving = None
        self.version = version

    def require_complete(self) -> int:
        """The version of the weights, if there is one: nothing may be sampled from half an update."""
        if self.version is None:
            raise WeightTransferError("the engine's weights are incomplete: finish an update before sampling")
        return self.version

    def lose(self) -> None:
        """The weights are gone, as after a sleep; a complete update brings others."""
        self.version = None
        self._arriving = None

    def _enter_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._expected:
            near = difflib.get_close_matches(name, self._expected, n=1)
            hint = f"; the nearest it knows is {near[0]}" if near else ""
            raise WeightTransferError(f"{name}: the engine does not expect a tensor of this name{hint}")
        if shape != self._expected[name]:
            raise WeightTransferError(f"{name}: shape {shape} arrived and the engine expects {self._expected[name]}")
        if name in self._arrived:
            raise WeightTransferError(f"{name}: arrived twice in update {self._arriving}")
        self._arrived.add(name)
