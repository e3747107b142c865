"""Extension points by name: a row of a table, or ``package.module:function``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from traceback import extract_tb
from typing import Final, TypeVar, cast

from chatlearn.errors import ConfigError

Thing = TypeVar("Thing")

# The body of a user's module can raise anything. These are all families of Python's own errors, which is what a slip of
# the pen raises. An exception class of somebody's own is no slip: it falls through with the traceback of its author.
SLIPS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def resolve(table: Mapping[str, Thing], name: str, what: str) -> Thing:
    """The thing called ``name``; ``what`` is the key that asked for it, for messages.

    >>> resolve({"grpo": sum}, "grop", "runtime_args.advantage")
    Traceback (most recent call last):
    chatlearn.errors.ConfigError: runtime_args.advantage=grop is unknown; did you mean grpo?
    """
    if name in table:
        return table[name]
    if ":" in name:
        # What a user names must be of the table's type; the contract tests for plug-ins check that, Python cannot.
        return cast("Thing", imported(name, what))
    close = get_close_matches(name, list(table), n=1)
    hint = f"did you mean {close[0]}?" if close else f"use {', '.join(sorted(table))} or package.module:function"
    raise ConfigError(f"{what}={name} is unknown; {hint}")


def imported(path: str, what: str) -> Callable[..., object]:
    """Import ``package.module:function``.

    A module that is missing or broken, and a name that is missing or no function, is a ConfigError about the key
    ``what``.
    """
    module_name, _, name = path.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{what}={path}: cannot import {module_name} ({error}); is its folder on PYTHONPATH?"
        ) from error
    except SLIPS as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{what}={path}: importing {module_name} failed at {_place(error)} ({type(error).__name__}: {said})"
        ) from error
    things = vars(module)
    if name not in things:
        close = get_close_matches(name, list(things), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{what}={path}: {module_name} has no {name or 'name after the colon'}{hint}")
    if not callable(things[name]):
        raise ConfigError(f"{what}={path} is {type(things[name]).__name__}, not a function")
    return things[name]


def _place(error: BaseException) -> str:
    """File and line of a mistake in somebody's module."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frame = extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"
