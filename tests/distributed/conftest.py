"""Gangs of one, two and four ranks, each started when the first test of a file asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import tiny_models
from gang import Gang, GangOf


@pytest.fixture(scope="module")
def gang_of() -> Iterator[GangOf]:
    """The gang of a given size. To fork one costs little, and threads of Gloo that wait for nothing never rest."""
    gangs: dict[int, Gang] = {}
    with ExitStack() as stack:

        def get(num_ranks: int) -> Gang:
            if num_ranks not in gangs:
                gangs[num_ranks] = stack.enter_context(closing(Gang(num_ranks)))
            return gangs[num_ranks]

        yield get


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of random tiny models by name."""
    return tiny_models.write_all(tmp_path_factory.mktemp("models"))
