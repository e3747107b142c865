"""The trackers, with their real packages where there are any."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from chatlearn.errors import MissingExtraError, RunError
from chatlearn.observability.journal import Journal
from chatlearn.observability.sinks import SINKS, JournalSpec, WandbSpec, chosen_sinks

QUIET = Console(file=io.StringIO())


def wandb_spec(directory: Path) -> WandbSpec:
    return WandbSpec(project="tests", directory=directory, name="a run", run_id=None, resume="allow")


def test_trackers_are_used_only_when_asked_for(tmp_path: Path) -> None:
    assert chosen_sinks(JournalSpec(tmp_path, 1)) == ["console", "jsonl"]
    asked = JournalSpec(tmp_path, 1, tensorboard_dir=tmp_path, wandb=wandb_spec(tmp_path))
    assert chosen_sinks(asked) == list(SINKS)


def test_the_journal_loads_no_tracker_torch_or_engine() -> None:
    program = """
import sys, chatlearn.observability.journal
heavy = {"torch", "wandb", "tensorboard", "ray", "vllm", "plotext", "transformers"}
sys.exit(", ".join(heavy & sys.modules.keys()) or 0)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, resume_after in ((1, 3, None), (3, 4, 2)):
        spec = JournalSpec(tmp_path, 4, tensorboard_dir=tmp_path / "tensorboard", resume_after=resume_after)
        with Journal.open(spec, QUIET) as journal:
            for step in range(first, last + 1):
                journal.write(step, {"rollout/reward_mean": step / 8 + (resume_after or 0)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("rollout/reward_mean")]
    assert points == [(1, 0.125), (2, 0.25), (3, 2.375), (4, 2.5)]


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB writes it, after wandb's header of 7 bytes; enough for files of one block.

    A record is checksum (4 bytes), length (2 bytes), kind (1 byte; 1 is a whole record) and data.
    """
    assert len(content) < 32_768, "records may be split where a block ends"
    position = 7
    while position < len(content):
        length, kind = struct.unpack_from("<HB", content, position + 4)
        assert kind == 1
        yield content[position + 7 : position + 7 + length]
        position += 7 + length


def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    spec = JournalSpec(tmp_path, 2, wandb=wandb_spec(tmp_path / "wandb"), settings={"runtime_args": {"seed": 5}})
    with Journal.open(spec, QUIET) as journal:
        journal.write(1, {"rollout/reward_mean": 0.5})
        journal.write(2, {"rollout/reward_mean": 0.75})
    (path,) = (tmp_path / "wandb").rglob("*.wandb")
    records = [Record.FromString(data) for data in leveldb_log(path.read_bytes())]
    runs = [record.run for record in records if record.HasField("run")]
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    assert (runs[0].project, runs[0].display_name, runs[0].run_id) == ("tests", "a run", identity)
    config = {item.key: item.value_json for run in runs for item in run.config.update}
    assert json.loads(config["runtime_args"]) == {"seed": 5}
    history = [
        {(item.key or item.nested_key[-1]): item.value_json for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["rollout/reward_mean"]) for row in history] == [("1", "0.5"), ("2", "0.75")]


def test_an_absent_wandb_names_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    spec = JournalSpec(tmp_path, 1, wandb=wandb_spec(tmp_path))
    with pytest.raises(MissingExtraError, match=r"pip install 'chatlearn\[wandb\]'"), Journal.open(spec, QUIET):
        pass


def test_a_failing_file_names_the_sink(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with (
        pytest.raises(RunError, match="the metrics sink 'jsonl' failed"),
        Journal.open(JournalSpec(tmp_path, 1), QUIET),
    ):
        pass
