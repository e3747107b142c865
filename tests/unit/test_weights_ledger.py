"""An update is complete when every expected tensor arrived once in its shape, and only then is there a version."""

from __future__ import annotations

from typing import Any

import pytest

from chatlearn.errors import WeightTransferError
from chatlearn.weights.ledger import ArrivalLedger

EXPECTED = {"a.weight": (2, 3), "b.weight": (4,), "c.bias": (1,)}


def info(*names: str, **shapes: tuple[int, ...]) -> dict[str, Any]:
    return {"names": list(names), "shapes": [list(shapes.get(name[0], EXPECTED.get(name, ()))) for name in names]}


def test_a_complete_update_brings_its_version() -> None:
    ledger = ArrivalLedger(EXPECTED, version=0)
    assert ledger.require_complete() == 0
    ledger.begin(3)
    ledger.enter(info("a.weight", "b.weight"))
    with pytest.raises(WeightTransferError, match="incomplete"):
        ledger.require_complete()
    ledger.enter(info("c.bias"))
    ledger.finish(3)
    assert ledger.require_complete() == 3


def test_missing_names_are_named_and_leave_no_version() -> None:
    ledger = ArrivalLedger(EXPECTED, version=0)
    ledger.begin(1)
    ledger.enter(info("a.weight"))
    with pytest.raises(WeightTransferError, match=r"did not bring b.weight, c.bias; .* 3 tensors and 1 arrived"):
        ledger.finish(1)
    with pytest.raises(WeightTransferError, match="incomplete"):
        ledger.require_complete()


@pytest.mark.parametrize(
    ("arrival", "message"),
    [
        (info("a.weigth"), "a.weigth: the engine does not expect .* nearest it knows is a.weight"),
        (info("a.weight", a=(3, 2)), r"a.weight: shape \(3, 2\) arrived and the engine expects \(2, 3\)"),
        (info("b.weight", "b.weight"), "b.weight: arrived twice"),
    ],
)
def test_unknown_misshaped_and_doubled_tensors_are_named(arrival: dict[str, Any], message: str) -> None:
    ledger = ArrivalLedger(EXPECTED, version=0)
    ledger.begin(1)
    with pytest.raises(WeightTransferError, match=message):
        ledger.enter(arrival)


def test_messages_out_of_turn_are_refused() -> None:
    ledger = ArrivalLedger(EXPECTED, version=0)
    with pytest.raises(WeightTransferError, match="outside an update"):
        ledger.enter(info("a.weight"))
    ledger.begin(1)
    with pytest.raises(WeightTransferError, match="update 2 ended while update 1"):
        ledger.finish(2)


def test_a_new_update_does_not_count_what_an_abandoned_one_brought() -> None:
    ledger = ArrivalLedger(EXPECTED, version=0)
    ledger.begin(1)
    ledger.enter(info("a.weight", "b.weight"))
    ledger.begin(2)
    ledger.enter(info("c.bias"))
    with pytest.raises(WeightTransferError, match=r"did not bring a\.weight, b\.weight"):
        ledger.finish(2)
