"""The option by which a user puts a function of their own through one of our contracts."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known when pytest is given a path below this folder."""
    parser.addoption("--plugin", metavar="PACKAGE.MODULE:FUNCTION", help="the function to test instead of ours")
