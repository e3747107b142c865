"""What a run was in the middle of comes back as it was saved, or the checkpoint is refused."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from chatlearn.checkpoint.open_groups import load_open_groups, save_open_groups
from chatlearn.checkpoint.run_state import RunState, load_run_state, save_counters, save_run_state
from chatlearn.errors import CheckpointError
from chatlearn.records import Completion, FinishReason, OpenGroup, Prompt, Score, VersionRun

LAYERS, CHOICES = 2, 3

texts = st.text(max_size=8)
reasons: st.SearchStrategy[FinishReason] = st.sampled_from(("stop", "length", "abort"))
numbers = st.floats(allow_nan=False, width=32)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    counts = draw(st.lists(st.integers(1, 4), max_size=3))
    num_tokens, routed = sum(counts), draw(st.booleans())
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=num_tokens, max_size=num_tokens))
    logprobs = draw(st.lists(numbers, min_size=num_tokens, max_size=num_tokens))
    experts = np.arange((num_tokens + 1) * LAYERS * CHOICES, dtype=np.uint8).reshape(-1, LAYERS, CHOICES)
    return Completion(
        token_ids=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        text=draw(texts),
        finish_reason=draw(reasons),
        versions=tuple(VersionRun(draw(st.integers(0, 9)), count) for count in counts),
        routed_experts=experts if routed else None,
    )


prompts = st.builds(
    Prompt, texts, st.lists(st.integers(0, 99), max_size=4).map(lambda t: np.array(t, np.int32)), texts, texts, texts
)
scores = st.builds(Score, st.floats(allow_nan=False), st.dictionaries(texts, numbers, max_size=2), st.none() | texts)
groups = st.builds(
    OpenGroup,
    prompts,
    st.lists(completions(), max_size=3).map(tuple),
    st.lists(completions(), max_size=2).map(tuple),
    st.lists(scores, max_size=3).map(tuple),
    st.integers(0, 99),
    st.integers(0, 9),
)


def plain(value: object) -> object:
    """A record as plain values: numpy's arrays do not compare to one truth."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tolist()
    if is_dataclass(value):
        return [plain(getattr(value, field.name)) for field in fields(value)]
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


@settings(max_examples=60, deadline=None, derandomize=True)
@given(saved=st.lists(groups, max_size=4))
def test_open_groups_come_back_to_the_bit(saved: list[OpenGroup]) -> None:
    with TemporaryDirectory() as folder:
        state = RunState(3, 12, 3, 7, 9, 1000, schedule="async", open_groups=tuple(saved))
        save_run_state(Path(folder), state)
        assert plain(load_run_state(Path(folder))) == plain(state)


def group() -> OpenGroup:
    answer = Completion(
        np.array([5, 6], np.int32), np.array([-0.5, -1.0], np.float32), "ab", "length", (VersionRun(1, 2),)
    )
    return OpenGroup(Prompt("0_1", np.array([1, 2], np.int32), "?", "source", "4"), (answer,), (answer,), (Score(1.0),))


def test_nothing_open_writes_nothing(tmp_path: Path) -> None:
    save_open_groups(tmp_path, ())
    assert list(tmp_path.iterdir()) == []
    assert load_open_groups(tmp_path) == ()


def test_the_readable_copy_counts_them_only(tmp_path: Path) -> None:
    save_counters(tmp_path, RunState(3, 12, 3, 7, 9, 1000, open_groups=(group(),)))
    assert [path.name for path in tmp_path.iterdir()] == ["run_state.json"]
    assert json.loads((tmp_path / "run_state.json").read_text())["num_open_groups"] == 1


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"num_tokens": 2', '"num_tokens": 1', "leaves {'token_ids': 1} over"),
        ('"num_tokens": 2', '"num_tokens": 3', "speaks of more token_ids than there are"),
        ('"finish_reason": "length"', '"finish_reason": "tired"', "ended by 'tired'"),
        ('"tokens_of_versions": [2]', '"tokens_of_versions": [1]', "do not cover its tokens"),
        ('"version": 0', '"version": -1', "'version' is -1"),
        ('"schema_version": 1', '"schema_version": 9', "schema_version is 9"),
    ],
)
def test_damage_is_named(tmp_path: Path, old: str, new: str, fault: str) -> None:
    save_open_groups(tmp_path, (group(),))
    path = tmp_path / "open_groups.json"
    described = json.dumps(json.loads(path.read_text()))
    assert old in described
    path.write_text(described.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=fault):
        load_open_groups(tmp_path)


@pytest.mark.parametrize("missing", ["token_ids", "logprobs"])
def test_a_stream_that_is_not_there_is_named(tmp_path: Path, missing: str) -> None:
    save_open_groups(tmp_path, (group(),))
    streams = load_file(tmp_path / "open_groups.safetensors")
    save_file(
        {name: stream for name, stream in streams.items() if name != missing}, tmp_path / "open_groups.safetensors"
    )
    with pytest.raises(CheckpointError, match="holds no tokens or no log-probabilities"):
        load_open_groups(tmp_path)


def test_lost_streams_are_named(tmp_path: Path) -> None:
    save_open_groups(tmp_path, (group(),))
    (tmp_path / "open_groups.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_open_groups(tmp_path)
