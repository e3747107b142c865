"""The run's state comes back as it was saved, or not at all."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.checkpoint.run_state import RunState, load_run_state, save_run_state
from chatlearn.errors import CheckpointError

counters = st.integers(0, 2**63)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    state=st.builds(
        RunState,
        *[counters] * 6,
        deferred=st.lists(counters, max_size=3).map(tuple),
        gone_back_to=st.none() | counters,
        evaluation=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    )
)
def test_a_saved_state_comes_back_equal(state: RunState) -> None:
    with TemporaryDirectory() as folder:
        save_run_state(Path(folder) / "deep" / "er", state)
        save_run_state(Path(folder) / "deep" / "er", state)
        assert load_run_state(Path(folder) / "deep" / "er") == state


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"episode": 3', '"episode": -3', "'episode' is -3"),
        ('"offset": 9', '"offset": true', "'offset' is True"),
        ('"deferred": []', '"deferred": [1, "2"]', "'deferred'"),
        ('"epoch": 7', '"epok": 7', "'epoch' is None"),
        ('"schema_version": 1', '"schema_version": 9', "schema_version is 9"),
        ('"schedule": ""', '"schedule": 3', "'schedule' is 3"),
        ('"gone_back_to": null', '"gone_back_to": -1', "'gone_back_to' is -1"),
        ('"evaluation": {}', '"evaluation": {"eval/x/avg@1": "high"}', "'eval/x/avg@1' is 'high'"),
        ("{", "[", "cannot be read as JSON"),
    ],
)
def test_a_damaged_state_is_refused_with_file_and_fault(tmp_path: Path, old: str, new: str, fault: str) -> None:
    save_run_state(tmp_path, RunState(3, 12, 3, 7, 9, 1000))
    path = tmp_path / "run_state.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CheckpointError, match=rf"run_state\.json: .*{fault}"):
        load_run_state(tmp_path)


def test_a_missing_state_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run_state\.json is missing"):
        load_run_state(tmp_path)
