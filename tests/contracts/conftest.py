"""The engine under test, and the option by which a user puts a function of their own through one of our contracts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines import SPEC

from chatlearn.rollout.engine import RolloutEngine, build_engine
from chatlearn.rollout.environment import engine_environment


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known when pytest is given a path below this folder."""
    parser.addoption("--plugin", metavar="PACKAGE.MODULE:FUNCTION", help="the function to test instead of ours")


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest) -> Iterator[RolloutEngine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(SPEC).items():
            patch.setenv(name, value)
        # vLLM replaces this function on the CPU; the patch puts it back.
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        torch.set_num_threads(1)
        built = build_engine(request.param, SPEC)
        yield built
        built.close()
