"""The kinds of values that keys take, and the section that all of the schema is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def as_text(value: object) -> object:
    """YAML reads ``exp_name=8`` as a number; where a text is wanted, a number is its own spelling."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def as_groups(value: object) -> object:
    """A flat list of roles is one group; lists become tuples, because configurations are frozen."""
    if not isinstance(value, list | tuple):
        return value
    nested = [item if isinstance(item, list | tuple) else None for item in value]
    if all(group is None for group in nested):
        return (tuple(value),) if value else ()
    return tuple(tuple(group) if group is not None else (item,) for item, group in zip(value, nested, strict=True))


def as_tuple(value: object) -> object:
    """Lists become tuples, because configurations are frozen; one name is a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def as_switch(value: object) -> object:
    """YAML reads ``off`` as False; where ``off`` is one of several words, that is its own spelling."""
    return "off" if value is False else value


def as_absent(value: object) -> object:
    """False and 0, the values by which others of its kind are switched off, ask for nothing."""
    return None if value is False or value == 0 else value


Text = Annotated[str, BeforeValidator(as_text)]
Weighing = Annotated[Literal["off", "truncate", "mask"], BeforeValidator(as_switch)]
Role = Literal["policy", "policy_trainer", "ref_policy", "reward", "partial_rollout_manager", "rollout_manager"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
AtMostOne = Annotated[float, Field(ge=0, le=1)]
AtLeastOne = Annotated[float, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TopK = Annotated[int, Field(ge=-1)]


class Section(BaseModel):
    """A group of keys: frozen, closed, strict about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
